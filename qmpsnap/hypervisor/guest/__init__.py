"""The guest's run state, its agent's freeze, and the watchdog over both."""
