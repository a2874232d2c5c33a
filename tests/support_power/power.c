/* A power cut in a preloaded library: beside each database file FILE stands FILE.disk, which holds what a sync has
 * put on the disk and nothing more. Whoever kills the process and puts FILE.disk in FILE's place has pulled the plug.
 *
 * Files are those whose name ends in ".db" or ".db-wal". Writes are kept in order until the sync that covers them.
 * A kill in the middle of a sync leaves a part of them: a torn sync, which a power cut leaves as well.
 * Not modelled: that a rename or a new name needs a sync of its folder.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

enum { FILES = 1024 };

struct change {
    struct change *next;
    off_t at;
    size_t length;
    int truncates;
    char bytes[];
};

static struct file {
    int disk; /* descriptor of FILE.disk, or 0 */
    struct change *first, **last;
} files[FILES];

static void *next(const char *name) {
    void *function = dlsym(RTLD_NEXT, name);
    if (!function) {
        fprintf(stderr, "power: there is no %s\n", name);
        abort();
    }
    return function;
}

static struct file *of(int fd) {
    return fd >= 0 && fd < FILES && files[fd].disk ? &files[fd] : NULL;
}

static int is_ours(const char *path) {
    size_t length = strlen(path);
    return (length > 3 && !strcmp(path + length - 3, ".db")) ||
           (length > 7 && !strcmp(path + length - 7, ".db-wal"));
}

static void disk_name(const char *path, char *name, size_t size) {
    if ((size_t)snprintf(name, size, "%s.disk", path) >= size) abort();
}

static int opened(int fd, const char *path, int (*real)(const char *, int, ...)) {
    char name[4096];
    if (fd < 0 || fd >= FILES || !is_ours(path)) return fd;
    disk_name(path, name, sizeof name);
    files[fd].disk = real(name, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (files[fd].disk < 0) abort();
    files[fd].first = NULL;
    files[fd].last = &files[fd].first;
    return fd;
}

#define OPEN(name)                                                 \
    int name(const char *path, int flags, ...) {                   \
        static int (*real)(const char *, int, ...);                 \
        if (!real) real = next(#name);                             \
        va_list rest;                                              \
        va_start(rest, flags);                                     \
        int mode = va_arg(rest, int);                              \
        va_end(rest);                                              \
        return opened(real(path, flags, mode), path, real);        \
    }
OPEN(open)
OPEN(open64)

static void note(struct file *file, const void *bytes, size_t length, off_t at, int truncates) {
    struct change *change = malloc(sizeof *change + length);
    if (!change) abort();
    *change = (struct change){.at = at, .length = length, .truncates = truncates};
    if (length) memcpy(change->bytes, bytes, length);
    *file->last = change;
    file->last = &change->next;
}

#define PWRITE(name)                                                        \
    ssize_t name(int fd, const void *bytes, size_t length, off_t at) {      \
        static ssize_t (*real)(int, const void *, size_t, off_t);           \
        if (!real) real = next(#name);                                      \
        ssize_t done = real(fd, bytes, length, at);                         \
        if (done > 0 && of(fd)) note(of(fd), bytes, (size_t)done, at, 0);   \
        return done;                                                        \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t write(int fd, const void *bytes, size_t length) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = next("write");
    off_t at = of(fd) ? lseek(fd, 0, SEEK_CUR) : 0;
    ssize_t done = real(fd, bytes, length);
    if (done > 0 && of(fd)) note(of(fd), bytes, (size_t)done, at, 0);
    return done;
}

#define TRUNCATE(name)                                    \
    int name(int fd, off_t length) {                      \
        static int (*real)(int, off_t);                   \
        if (!real) real = next(#name);                    \
        int failed = real(fd, length);                    \
        if (!failed && of(fd)) note(of(fd), NULL, 0, length, 1); \
        return failed;                                    \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

static void reaches_the_disk(int fd) {
    static ssize_t (*put)(int, const void *, size_t, off_t);
    static int (*cut)(int, off_t);
    struct file *file = of(fd);
    if (!file) return;
    if (!put) put = next("pwrite64"), cut = next("ftruncate64");
    while (file->first) {
        struct change *change = file->first;
        int failed = change->truncates
                         ? cut(file->disk, change->at)
                         : put(file->disk, change->bytes, change->length, change->at) < (ssize_t)change->length;
        if (failed) abort();
        file->first = change->next;
        free(change);
    }
    file->last = &file->first;
}

#define SYNC(name)                          \
    int name(int fd) {                      \
        static int (*real)(int);            \
        if (!real) real = next(#name);      \
        int failed = real(fd);              \
        if (!failed) reaches_the_disk(fd);  \
        return failed;                      \
    }
SYNC(fsync)
SYNC(fdatasync)

int close(int fd) {
    static int (*real)(int);
    if (!real) real = next("close");
    struct file *file = of(fd);
    if (file) {
        while (file->first) {
            struct change *change = file->first;
            file->first = change->next;
            free(change);
        }
        real(file->disk);
        file->disk = 0;
    }
    return real(fd);
}

int unlink(const char *path) {
    int (*real)(const char *) = next("unlink");
    char name[4096];
    if (is_ours(path)) {
        disk_name(path, name, sizeof name);
        real(name);
    }
    return real(path);
}
