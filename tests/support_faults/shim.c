/* Faults between the agent and the C library, for LD_PRELOAD: syncs that fail or take long, writes that fail or are
 * swallowed, a file system that takes no writes, a wall clock that is wrong. The monotonic clocks are left alone.
 *
 * The switches are numbers in a file that FIELDPOST_TEST_FAULTS names, mapped into memory: whoever writes the file
 * turns them. Their order is that of `Switch` in tests/support/faults.rs. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/timex.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

enum {
    SYNC_ERROR,   /* errno of a failing sync */
    SYNC_GOOD,    /* so many succeed before */
    SYNC_BAD,     /* so many fail then; -1: all */
    SYNC_DELAY,   /* milliseconds each sync takes longer */
    WRITE_ERROR,  /* errno of every pwrite; -1: says that it wrote, and did not */
    OPEN_ERROR,   /* errno of every open for writing, mkdir, unlink and rename */
    CLOCK_OFFSET, /* milliseconds the wall clock is ahead */
    CLOCK_STATE,  /* 0: what the kernel says; 1: not synchronised; 2: synchronised */
    SYNCS,        /* counted here: syncs */
    FAILURES,     /* counted here: calls that were failed or swallowed */
    SWITCHES
};

static volatile int64_t none[SWITCHES];
static volatile int64_t *turned = none;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FIELDPOST_TEST_FAULTS");
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    int file = path && real ? real(path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *memory = mmap(NULL, SWITCHES * sizeof *turned, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory != MAP_FAILED) turned = memory;
    close(file);
}

static int fail(int64_t error) {
    __sync_fetch_and_add(&turned[FAILURES], 1);
    errno = (int)error;
    return -1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int sync_fails(void) {
    __sync_fetch_and_add(&turned[SYNCS], 1);
    int64_t delay = turned[SYNC_DELAY];
    if (delay > 0) {
        struct timespec span = {delay / 1000, delay % 1000 * 1000000};
        nanosleep(&span, NULL);
    }
    if (turned[SYNC_BAD] == 0) return 0;
    if (turned[SYNC_GOOD] > 0) {
        turned[SYNC_GOOD]--;
        return 0;
    }
    if (turned[SYNC_BAD] > 0) turned[SYNC_BAD]--;
    return 1;
}

int fsync(int file) { return sync_fails() ? fail(turned[SYNC_ERROR]) : REAL(fsync)(file); }

int fdatasync(int file) { return sync_fails() ? fail(turned[SYNC_ERROR]) : REAL(fdatasync)(file); }

ssize_t pwrite64(int file, const void *from, size_t bytes, off64_t at) {
    if (turned[WRITE_ERROR] < 0) {
        __sync_fetch_and_add(&turned[FAILURES], 1);
        return (ssize_t)bytes;
    }
    if (turned[WRITE_ERROR] > 0) return fail(turned[WRITE_ERROR]);
    return REAL(pwrite64)(file, from, bytes, at);
}

static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT); }

int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    if (turned[OPEN_ERROR] && writes(flags)) return fail(turned[OPEN_ERROR]);
    return REAL(open)(path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    if (turned[OPEN_ERROR] && writes(flags)) return fail(turned[OPEN_ERROR]);
    return REAL(open64)(path, flags, mode);
}

int ftruncate64(int file, off64_t bytes) {
    return turned[OPEN_ERROR] ? fail(turned[OPEN_ERROR]) : REAL(ftruncate64)(file, bytes);
}

int mkdir(const char *path, mode_t mode) {
    return turned[OPEN_ERROR] ? fail(turned[OPEN_ERROR]) : REAL(mkdir)(path, mode);
}

int unlink(const char *path) { return turned[OPEN_ERROR] ? fail(turned[OPEN_ERROR]) : REAL(unlink)(path); }

int rename(const char *from, const char *to) {
    return turned[OPEN_ERROR] ? fail(turned[OPEN_ERROR]) : REAL(rename)(from, to);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int outcome = REAL(clock_gettime)(clock, now);
    int64_t offset = turned[CLOCK_OFFSET];
    if (outcome == 0 && offset != 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        int64_t nanoseconds = now->tv_nsec + offset % 1000 * 1000000;
        now->tv_sec += offset / 1000 + (nanoseconds >= 1000000000) - (nanoseconds < 0);
        now->tv_nsec = (nanoseconds + 1000000000) % 1000000000;
    }
    return outcome;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &exact) != 0) return -1;
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

int adjtimex(struct timex *state) {
    int outcome = REAL(adjtimex)(state);
    if (turned[CLOCK_STATE] == 1) {
        state->status |= STA_UNSYNC;
        return TIME_ERROR;
    }
    if (turned[CLOCK_STATE] == 2) {
        state->status &= ~STA_UNSYNC;
        return TIME_OK;
    }
    return outcome;
}
