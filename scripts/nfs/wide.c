/* Preloaded into user-mode Linux, whose buffer for a process's vector registers has a fixed size. A
 * processor with AMX has more of them, and its kernel refuses a set that is not whole: EFAULT, and
 * a panic before init. Here what the kernel has is read first, and the part that is known laid over it.
 * The newer kernel (see `newer`) needs none of that, but two functions of a newer C library. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

long ptrace(enum __ptrace_request request, ...)
{
    static long (*next)(enum __ptrace_request, ...);
    static char whole[1 << 16] __attribute__((aligned(64)));
    va_list words;
    va_start(words, request);
    pid_t pid = va_arg(words, pid_t);
    void *address = va_arg(words, void *), *data = va_arg(words, void *);
    va_end(words);
    if (!next)
        next = (long (*)(enum __ptrace_request, ...))dlsym(RTLD_NEXT, "ptrace");
    if (request == PTRACE_SETREGSET && (unsigned long)address == NT_X86_XSTATE) {
        struct iovec *given = data, all = {whole, sizeof whole};
        if (next(PTRACE_GETREGSET, pid, address, &all) == 0 && all.iov_len > given->iov_len) {
            memcpy(whole, given->iov_base, given->iov_len);
            return next(request, pid, address, &all);
        }
    }
    return next(request, pid, address, data);
}

long isoc23_strtol(const char *, char **, int) __asm__("__isoc23_strtol");
unsigned long isoc23_strtoul(const char *, char **, int) __asm__("__isoc23_strtoul");

long isoc23_strtol(const char *text, char **end, int base)
{
    return strtol(text, end, base);
}

unsigned long isoc23_strtoul(const char *text, char **end, int base)
{
    return strtoul(text, end, base);
}
