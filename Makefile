.PHONY: check test demo bench
check test demo bench:
	scripts/$@
