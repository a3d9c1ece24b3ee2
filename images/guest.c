/* The only program of ours inside the test guest: witness, witness-check, prev, dirty-ram, hot-ram,
 * dirty-disk, fill and heartbeat, by the name it is called by. README.md: what each promises. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096 /* one O_DIRECT transfer, whatever the disk's sectors */
#define RECORD 64  /* repeated all over the block, so that a torn one shows */
#define DISKS 8
typedef unsigned long long u64;

struct state { /* on tmpfs: guest RAM and nothing else */
    u64 nonce;
    volatile u64 ram, bad;
    int disks;
};

static int console = 1, disk[DISKS];
static char *block;

static void die(const char *what)
{
    dprintf(2, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static u64 now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void nap(u64 ns)
{
    struct timespec t = { ns / 1000000000, ns % 1000000000 };
    nanosleep(&t, NULL);
}

static u64 draw(u64 *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    return *seed ^= *seed << 17;
}

static struct state *attach(int flags)
{
    int fd = open("/run/witness", flags, 0600);
    if (fd < 0 || ((flags & O_CREAT) && ftruncate(fd, BLOCK))) die("/run/witness");
    void *p = mmap(NULL, BLOCK, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED) die("mmap");
    return p;
}

static int open_disks(const char *name, int flags)
{
    char path[64];
    int n = 0;
    for (int i = 0; i < DISKS; i++) {
        snprintf(path, sizeof path, "/data/%d/%s", i, name);
        int fd = open(path, flags, 0600);
        if (fd >= 0) disk[n++] = fd;
        else if (errno != ENOENT && errno != EROFS) perror(path);
    }
    return n;
}

static void compose(char *to, u64 nonce, u64 count)
{
    memset(to, '.', BLOCK);
    for (int i = 0; i < BLOCK; i += RECORD) {
        int n = sprintf(to + i, "W %016llx %020llu", nonce, count);
        to[i + n] = '.';
        to[i + RECORD - 1] = '\n';
    }
}

/* 1: a whole record; 0: none, torn or unreadable. Past the page cache, as the disks have it. */
static int fetch(int fd, u64 *nonce, u64 *count)
{
    char whole[BLOCK];
    *nonce = *count = 0;
    if (pread(fd, block, BLOCK, 0) != BLOCK) return 0;
    if (sscanf(block, "W %16llx %20llu.", nonce, count) != 2) return 0;
    compose(whole, *nonce, *count);
    return memcmp(whole, block, BLOCK) == 0;
}

/* One write a line: the tty keeps it whole among the lines of others. */
static void report(const char *word, u64 nonce, u64 ram, int n, const u64 *count, const u64 *whose)
{
    char line[512];
    int k = sprintf(line, "%s nonce=%016llx ram=%llu", word, nonce, ram);
    for (int i = 0; i < n; i++) {
        k += sprintf(line + k, " disk%d=%llu", i, count[i]);
        if (whose[i] != nonce) k += sprintf(line + k, "(nonce %llx)", whose[i]);
    }
    line[k++] = '\n';
    if (write(console, line, k) != k) _exit(1);
}

static int witness(u64 interval_ms)
{
    u64 said = 0;
    struct state *s = attach(O_RDWR | O_CREAT);
    u64 nonce[DISKS], count[DISKS];
    char line[64];

    console = open("/dev/console", O_WRONLY | O_NOCTTY);
    /* Not secret, only different at each boot: must not wait for the kernel's entropy. */
    if (getrandom(&s->nonce, sizeof s->nonce, GRND_INSECURE) < 0) s->nonce = now_ns();
    s->disks = open_disks("witness", O_RDWR | O_CREAT | O_DIRECT | O_DSYNC);
    for (int first = 1;; first = 0) {
        int ok = 1;
        for (int i = 0; i < s->disks && !first; i++)
            ok &= fetch(disk[i], &nonce[i], &count[i]) && nonce[i] == s->nonce && count[i] == s->ram;
        if (!ok) {
            s->bad++;
            report("WITNESS BAD", s->nonce, s->ram, s->disks, count, nonce);
        }
        s->ram++;
        for (int i = 0; i < s->disks; i++) {
            compose(block, s->nonce, s->ram);
            if (pwrite(disk[i], block, BLOCK, 0) < 0) continue; /* the next round will tell */
        }
        if (now_ns() - said >= 200000000ull) {
            said = now_ns();
            sprintf(line, "W %016llx %llu\n", s->nonce, s->ram);
            if (write(console, line, strlen(line)) < 0) return 1;
        }
        nap(interval_ms * 1000000);
    }
}

/* At any instant each disk holds ram or ram-1, a later disk never more than an earlier one. That
 * is judged where ram did not move while the disks were read, the last disk first. */
static int witness_check(void)
{
    struct state *s = attach(O_RDWR);
    u64 nonce[DISKS], count[DISKS], ram = 0;
    int n = open_disks("witness", O_RDWR | O_DIRECT), ok = 0;
    for (int try = 0; try < 100 && !ok; try++) {
        if (try) nap(3000000);
        ram = s->ram;
        ok = n == s->disks;
        for (int i = n - 1; i >= 0; i--) {
            ok &= fetch(disk[i], &nonce[i], &count[i]) && nonce[i] == s->nonce;
            ok &= count[i] == ram || count[i] + 1 == ram;
            ok &= i == n - 1 || count[i] >= count[i + 1];
        }
        ok &= ram == s->ram && ram > 0;
    }
    ok &= s->bad == 0;
    report(ok ? "OK" : "BAD", s->nonce, ram, n, count, nonce);
    if (s->bad) printf("mismatches=%llu\n", s->bad);
    return !ok;
}

static int prev(void)
{
    u64 nonce, count;
    int n = open_disks("witness", O_RDWR | O_DIRECT), k = 4;
    char line[512] = "PREV";
    for (int i = 0; i < n; i++) {
        k += fetch(disk[i], &nonce, &count)
            ? sprintf(line + k, " disk%d=%016llx %llu", i, nonce, count)
            : sprintf(line + k, " disk%d=none 0", i);
    }
    line[k++] = '\n';
    return write(1, line, k) != k;
}

static void dirty_ram(u64 mib, u64 rate)
{
    u64 pages = mib * 256, at = 0, start = now_ns(), done = 0, seed = start | 1;
    char *p = mmap(NULL, mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) die("dirty-ram");
    for (;;) {
        u64 due = (now_ns() - start) / 1000 * rate * 256 / 1000000;
        if (due - done > rate * 256) done = due - rate * 256; /* no more than 1 s to catch up */
        for (; done < due; done++, at = (at + 1) % pages) *(u64 *)(p + at * BLOCK) = draw(&seed);
        nap(5000000);
    }
}

/* Counts in all pages, one after the other, and looks whether each has what it counted last: RAM
 * that is not of one instant shows, here and to whoever reads the pages. No call, no page fault. */
static void hot_ram(u64 pages)
{
    struct { u64 magic[2], page, round; } *p;
    char *all = mmap(NULL, pages * BLOCK, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (all == MAP_FAILED) die("hot-ram");
    for (u64 round = 0;; round++) {
        for (u64 i = 0; i < pages; i++) {
            p = (void *)(all + i * BLOCK);
            if (round && p->round != round - 1)
                dprintf(open("/dev/console", O_WRONLY | O_NOCTTY),
                        "HOT BAD page=%llu round=%llu not=%llu\n", i, p->round, round - 1);
            memcpy(p->magic, "qmpsnap hot page", 16);
            p->page = i;
            *(volatile u64 *)&p->round = round;
        }
    }
}

static void dirty_disk(u64 rate)
{
    u64 start = now_ns(), done = 0, at = 0, seed = start | 1, chunk = rate < 640 ? 4 : 64;
    u64 *data = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int n = open_disks("busy", O_RDWR | O_CREAT | O_DIRECT);
    if (!n) die("dirty-disk: no disk");
    for (;;) {
        u64 due = (now_ns() - start) / 1000 * rate / 1000000;
        if (due - done > rate && due > done) done = due - rate;
        for (; done + chunk <= due; done += chunk, at++) {
            for (int i = 0; i < 8192; i += 16) data[i] = draw(&seed);
            u64 where = at / n * chunk * 1024 % (4 << 20);
            if (pwrite(disk[at % n], data, chunk * 1024, where) < 0) die("dirty-disk");
        }
        nap(5000000);
    }
}

/* Returns once the memory is full; a child keeps it, its number in /run/fill.pid. */
static int fill(u64 mib)
{
    u64 start = now_ns(), seed = start | 1;
    int done[2], pid = 0;
    if (pipe(done)) die("pipe");
    if (!fork()) {
        char *p = mmap(NULL, mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) die("fill");
        madvise(p, mib << 20, MADV_HUGEPAGE); /* page faults are what costs under TCG */
        for (u64 at = 0; at < mib << 20; at += 128) *(u64 *)(p + at) = draw(&seed);
        pid = getpid();
        if (write(done[1], &pid, sizeof pid) != sizeof pid) return 1;
        for (int fd = 0; fd < 10; fd++) close(fd);
        for (;;) pause();
    }
    close(done[1]);
    FILE *f = fopen("/run/fill.pid", "w");
    if (!f || read(done[0], &pid, sizeof pid) != sizeof pid)
        return dprintf(2, "fill: no %llu MiB free\n", mib), 1;
    fprintf(f, "%d\n", pid);
    fclose(f);
    printf("filled %llu MiB in %llu ms\n", mib, (now_ns() - start) / 1000000);
    return 0;
}

/* First in line for the CPU: its silence is to be the machine's, not the scheduler's. */
static void heartbeat(void)
{
    struct sched_param first = { .sched_priority = 50 };
    int fd = open("/dev/virtio-ports/org.qmpsnap.heartbeat", O_WRONLY);
    if (fd < 0) die("heartbeat");
    sched_setscheduler(0, SCHED_FIFO, &first);
    prctl(PR_SET_TIMERSLACK, 1);
    for (u64 n = 0;; n++) {
        char line[32];
        if (write(fd, line, sprintf(line, "%llu\n", n)) < 0 && errno != EAGAIN) nap(10000000);
        nap(1000000);
    }
}

int main(int argc, char **argv)
{
    const char *name = strrchr(argv[0], '/') ? strrchr(argv[0], '/') + 1 : argv[0];
    u64 a = argc > 1 ? strtoull(argv[1], 0, 10) : 0, b = argc > 2 ? strtoull(argv[2], 0, 10) : 0;
    /* A second page, always zero, ends the block as a string. */
    block = mmap(NULL, 2 * BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (!strcmp(name, "witness")) return witness(a);
    if (!strcmp(name, "witness-check")) return witness_check();
    if (!strcmp(name, "prev")) return prev();
    if (!strcmp(name, "dirty-ram") && a && b) dirty_ram(a, b);
    if (!strcmp(name, "hot-ram") && a) hot_ram(a);
    if (!strcmp(name, "dirty-disk") && a) dirty_disk(a);
    if (!strcmp(name, "fill") && a) return fill(a);
    if (!strcmp(name, "heartbeat")) heartbeat();
    return 2;
}
