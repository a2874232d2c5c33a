/* A disk that forgets what was not synced, preloaded into the agent.
 *
 * The database's files (DATABASE, DATABASE-wal, DATABASE-journal) are written as usual. Beside them a second
 * folder holds what a disk would hold if the power went now: a file's content gets there by fsync or fdatasync
 * of the file; a removal, and an empty new file, by fsync of the folder. Renames get there at once, as a
 * journalling file system may do it. After a kill, the torture puts that folder's files in place of the real
 * ones. Killed half way through a sync, it leaves some of what was being synced: so does a disk.
 *
 * What a killed process wrote and did not sync still waits in the system's cache, and is synced with the rest
 * by the next one. So a file that is opened counts as unsynced from end to end, until its first sync.
 *
 * The real sync is not called: it changes nothing here, and a long run would wear out the disk below.
 *
 * The panel is a file through which both sides see the same numbers: what this disk is to do, and what happened
 * on it. Whatever does not fit this model ends the agent with words.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#undef open
#undef openat

#define FDS 4096
#define FILES 64
#define RANGES 1024
#define KINDS 3
#define FOLDER (-2)

static const char *const SUFFIX[KINDS] = {"", "-wal", "-journal"};

struct panel {
    int64_t room;         /* bytes that may still be written; -1: any number */
    uint64_t sync_us;     /* how long a sync takes before anything of it is durable */
    uint64_t syncs;       /* files synced */
    uint64_t refused;     /* writes refused because the disk is full */
    uint64_t same[KINDS]; /* whether the durable file is an older state of the file there now */
    uint64_t attached;    /* processes that loaded this */
    uint64_t syncing;     /* whether a sync is under way */
};

/* A file as this process knows it; it outlives its descriptors, because what it did not sync does. */
struct file {
    int used, kind, named, created, whole, descriptors, durable, ranges;
    dev_t device;
    ino_t inode;
    struct { off_t from, to; } dirty[RANGES];
};

_Static_assert(sizeof(off_t) == 8, "written for 64-bit systems");

static struct file files[FILES];
static int of_fd[FDS]; /* 0: none of ours, FOLDER, or 1 + index of its file */
static struct panel *panel;
static const char *database, *durable;
static char folder[4096];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int (*real_open)(const char *, int, ...);
static int (*real_openat)(int, const char *, int, ...);
static int (*real_close)(int);
static int (*real_fsync)(int);
static ssize_t (*real_write)(int, const void *, size_t);
static ssize_t (*real_pwrite)(int, const void *, size_t, off_t);
static int (*real_ftruncate)(int, off_t);
static int (*real_fallocate)(int, int, off_t, off_t);
static int (*real_unlink)(const char *);
static int (*real_rename)(const char *, const char *);

static void give_up(const char *why)
{
    dprintf(2, "powercut: %s\n", why);
    abort();
}

static void *find(const char *name)
{
    void *function = dlsym(RTLD_NEXT, name);
    if (!function) give_up(name);
    return function;
}

__attribute__((constructor)) static void begin(void)
{
    if (real_open) return;
    real_openat = find("openat64");
    real_close = find("close");
    real_fsync = find("fsync");
    real_write = find("write");
    real_pwrite = find("pwrite64");
    real_ftruncate = find("ftruncate64");
    real_fallocate = find("fallocate64");
    real_unlink = find("unlink");
    real_rename = find("rename");
    real_open = find("open64");
    const char *path = getenv("POWERCUT_PANEL");
    const char *where = getenv("POWERCUT_DATABASE");
    durable = getenv("POWERCUT_DURABLE");
    if (!path || !where || !durable) return;
    int fd = real_open(path, O_RDWR | O_CLOEXEC);
    panel = mmap(0, sizeof *panel, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (panel == MAP_FAILED) give_up("the panel cannot be mapped");
    real_close(fd);
    snprintf(folder, sizeof folder, "%s", where);
    char *slash = strrchr(folder, '/');
    if (!slash) give_up("the database needs a path from the root");
    *slash = 0;
    __atomic_add_fetch(&panel->attached, 1, __ATOMIC_SEQ_CST);
    database = where;
}

static int kind_of(const char *path)
{
    size_t length = database ? strlen(database) : 0;
    if (!database || strncmp(path, database, length)) return -1;
    for (int kind = 0; kind < KINDS; kind++)
        if (!strcmp(path + length, SUFFIX[kind])) return kind;
    return -1;
}

static void path_of(char *path, size_t size, const char *where, int kind, const char *more)
{
    snprintf(path, size, "%s%s%s", where, SUFFIX[kind], more);
}

static struct file *file_of(int fd)
{
    return fd >= 0 && fd < FDS && of_fd[fd] > 0 ? &files[of_fd[fd] - 1] : 0;
}

static void forget_if_gone(struct file *file)
{
    if (file->descriptors || file->named) return;
    if (file->durable >= 0) real_close(file->durable);
    file->used = 0;
}

static void opened(int fd, const char *path, int kind, int flags, int created)
{
    if (fd < 0 || !database) return;
    if (fd >= FDS) give_up("more files are open than this can follow");
    if (!strcmp(path, folder)) of_fd[fd] = FOLDER;
    if (kind < 0) return;
    struct stat status;
    if (fstat(fd, &status)) give_up("an open file has no status");
    struct file *file = 0, *unused = 0;
    for (int i = 0; i < FILES; i++) {
        struct file *other = &files[i];
        if (!other->used) unused = unused ? unused : other;
        else if (other->named && other->inode == status.st_ino && other->device == status.st_dev) file = other;
    }
    if (!file) {
        if (!(file = unused)) give_up("more files are known than this can follow");
        memset(file, 0, sizeof *file);
        file->used = file->named = file->whole = 1;
        file->kind = kind, file->created = created, file->durable = -1;
        file->device = status.st_dev, file->inode = status.st_ino;
    }
    if (created) panel->same[kind] = 0;
    if (flags & O_TRUNC) file->whole = 1;
    file->descriptors++;
    of_fd[fd] = 1 + (int)(file - files);
}

static void changed(struct file *file, off_t from, off_t to)
{
    if (file->whole || from >= to) return;
    int last = file->ranges - 1;
    if (last >= 0 && file->dirty[last].to == from) file->dirty[last].to = to;
    else if (file->ranges == RANGES) file->whole = 1;
    else file->dirty[file->ranges].from = from, file->dirty[file->ranges++].to = to;
}

/* Never through a descriptor of its own: closing one would drop the process's locks on the file. */
static void copy(int fd, int to, off_t from, off_t end)
{
    static char buffer[1 << 16];
    while (from < end) {
        size_t most = (size_t)(end - from) < sizeof buffer ? (size_t)(end - from) : sizeof buffer;
        ssize_t count = pread64(fd, buffer, most, from);
        if (count <= 0) give_up("a file cannot be read back");
        if (real_pwrite(to, buffer, (size_t)count, from) != count) give_up("the durable folder cannot be written");
        from += count;
    }
}

static void sync_file(int fd, struct file *file)
{
    struct stat status;
    if (fstat(fd, &status)) give_up("an open file has no status");
    __atomic_add_fetch(&panel->syncs, 1, __ATOMIC_SEQ_CST);
    if (!file->named) return;
    if (file->whole) {
        char path[4200], new[4200];
        path_of(path, sizeof path, durable, file->kind, "");
        path_of(new, sizeof new, durable, file->kind, ".new");
        if (file->durable >= 0) real_close(file->durable);
        file->durable = real_open(new, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
        if (file->durable < 0) give_up("the durable folder cannot be written");
        copy(fd, file->durable, 0, status.st_size);
        if (real_rename(new, path)) give_up("the durable folder cannot be written");
        panel->same[file->kind] = 1;
    } else {
        for (int i = 0; i < file->ranges; i++) {
            off_t to = file->dirty[i].to < status.st_size ? file->dirty[i].to : status.st_size;
            copy(fd, file->durable, file->dirty[i].from, to);
        }
        if (real_ftruncate(file->durable, status.st_size)) give_up("the durable folder cannot be written");
    }
    file->whole = file->ranges = 0;
}

static void sync_folder(void)
{
    for (int kind = 0; kind < KINDS; kind++) {
        char real[4200], kept[4200];
        path_of(real, sizeof real, database, kind, "");
        path_of(kept, sizeof kept, durable, kind, "");
        if (access(real, F_OK)) real_unlink(kept);
        for (int i = 0; i < FILES; i++) {
            struct file *file = &files[i];
            if (!file->used || !file->named || !file->created || file->durable >= 0 || file->kind != kind) continue;
            int fd = real_open(kept, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
            if (fd >= 0) real_close(fd);
        }
    }
}

static int synced(int fd)
{
    if (!database || fd < 0 || fd >= FDS || !of_fd[fd]) return real_fsync(fd);
    /* What is written and not yet synced is what a power cut takes: a sync that took no time would leave none. */
    uint64_t microseconds = __atomic_load_n(&panel->sync_us, __ATOMIC_SEQ_CST);
    __atomic_store_n(&panel->syncing, 1, __ATOMIC_SEQ_CST);
    if (microseconds) usleep((useconds_t)microseconds);
    pthread_mutex_lock(&lock);
    struct file *file = file_of(fd);
    if (file) sync_file(fd, file);
    else sync_folder();
    pthread_mutex_unlock(&lock);
    __atomic_store_n(&panel->syncing, 0, __ATOMIC_SEQ_CST);
    return 0;
}

/* How many of these bytes the disk has room for; -1 with ENOSPC when it is full. */
static ssize_t room_for(size_t count)
{
    int64_t room = __atomic_load_n(&panel->room, __ATOMIC_SEQ_CST);
    while (room >= 0) {
        int64_t taken = (int64_t)count < room ? (int64_t)count : room;
        if (!taken && count) {
            __atomic_add_fetch(&panel->refused, 1, __ATOMIC_SEQ_CST);
            errno = ENOSPC;
            return -1;
        }
        if (__atomic_compare_exchange_n(&panel->room, &room, room - taken, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            return (ssize_t)taken;
    }
    return (ssize_t)count;
}

static ssize_t written(int fd, const void *bytes, size_t count, off_t at, struct file *file)
{
    ssize_t fits = room_for(count);
    if (fits < 0) return -1;
    pthread_mutex_lock(&lock);
    ssize_t done = real_pwrite(fd, bytes, (size_t)fits, at);
    if (done > 0) changed(file, at, at + done);
    pthread_mutex_unlock(&lock);
    return done;
}

static int resized(int fd, off_t length)
{
    struct file *file = file_of(fd);
    struct stat status;
    if (!file) return real_ftruncate(fd, length);
    pthread_mutex_lock(&lock);
    int failed = fstat(fd, &status);
    off_t growth = length - status.st_size;
    if (!failed && growth > 0 && room_for((size_t)growth) < growth) failed = 1, errno = ENOSPC;
    if (!failed) failed = real_ftruncate(fd, length);
    /* What was cut off may be written anew, or be zeros, before the sync. */
    if (!failed && length < status.st_size) changed(file, length, status.st_size);
    pthread_mutex_unlock(&lock);
    return failed ? -1 : 0;
}

/* ---- what the agent calls -------------------------------------------------------------------------------- */

#define MODE(flags, mode)                                   \
    mode_t mode = 0;                                        \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {                \
        va_list rest;                                       \
        va_start(rest, flags);                              \
        mode = va_arg(rest, mode_t);                        \
        va_end(rest);                                       \
    }

static int open_any(int at, const char *path, int flags, mode_t mode)
{
    begin();
    int kind = kind_of(path);
    if (kind < 0) {
        int fd = real_openat(at, path, flags, mode);
        if (database && !strcmp(path, folder)) opened(fd, path, kind, flags, 0);
        return fd;
    }
    pthread_mutex_lock(&lock);
    int created = access(path, F_OK) != 0;
    int fd = real_openat(at, path, flags, mode);
    opened(fd, path, kind, flags, created);
    pthread_mutex_unlock(&lock);
    return fd;
}

int open(const char *path, int flags, ...) { MODE(flags, mode) return open_any(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags, mode) return open_any(AT_FDCWD, path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE(flags, mode) return open_any(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE(flags, mode) return open_any(at, path, flags, mode); }

int close(int fd)
{
    begin();
    if (fd >= 0 && fd < FDS && of_fd[fd]) {
        pthread_mutex_lock(&lock);
        struct file *file = file_of(fd);
        of_fd[fd] = 0;
        if (file) file->descriptors--, forget_if_gone(file);
        pthread_mutex_unlock(&lock);
    }
    return real_close(fd);
}

ssize_t pwrite64(int fd, const void *bytes, size_t count, off_t at)
{
    begin();
    struct file *file = file_of(fd);
    return file ? written(fd, bytes, count, at, file) : real_pwrite(fd, bytes, count, at);
}

ssize_t pwrite(int fd, const void *bytes, size_t count, off_t at) { return pwrite64(fd, bytes, count, at); }

ssize_t write(int fd, const void *bytes, size_t count)
{
    begin();
    if (file_of(fd)) give_up("write() to the database, where only pwrite() was expected");
    return real_write(fd, bytes, count);
}

int ftruncate64(int fd, off_t length) { begin(); return resized(fd, length); }
int ftruncate(int fd, off_t length) { begin(); return resized(fd, length); }

int fallocate64(int fd, int mode, off_t from, off_t length)
{
    begin();
    struct file *file = file_of(fd);
    if (!file) return real_fallocate(fd, mode, from, length);
    if (room_for((size_t)length) < length) return errno = ENOSPC, -1;
    pthread_mutex_lock(&lock);
    int failed = real_fallocate(fd, mode, from, length);
    if (!failed) changed(file, from, from + length);
    pthread_mutex_unlock(&lock);
    return failed;
}

int fallocate(int fd, int mode, off_t from, off_t length) { return fallocate64(fd, mode, from, length); }
int posix_fallocate64(int fd, off_t from, off_t length) { return fallocate64(fd, 0, from, length) ? errno : 0; }
int posix_fallocate(int fd, off_t from, off_t length) { return posix_fallocate64(fd, from, length); }

int fsync(int fd) { begin(); return synced(fd); }
int fdatasync(int fd) { begin(); return synced(fd); }

/* The name goes; on the disk it goes when the folder is synced. */
static void name_gone(int kind)
{
    panel->same[kind] = 0;
    for (int i = 0; i < FILES; i++) {
        if (!files[i].used || !files[i].named || files[i].kind != kind) continue;
        files[i].named = 0;
        forget_if_gone(&files[i]);
    }
}

int unlink(const char *path)
{
    begin();
    int kind = kind_of(path);
    if (kind < 0) return real_unlink(path);
    pthread_mutex_lock(&lock);
    int failed = real_unlink(path);
    if (!failed) name_gone(kind);
    pthread_mutex_unlock(&lock);
    return failed;
}

/* A file made under another name becomes the database: it is taken to have been synced under that name. */
static int renamed_onto(const char *from, const char *to, int kind, int onto)
{
    char kept[4200];
    struct stat status;
    if (kind >= 0) give_up("one of the database's files is renamed to another, which this cannot follow");
    path_of(kept, sizeof kept, durable, onto, "");
    pthread_mutex_lock(&lock);
    int failed = real_rename(from, to);
    if (!failed) {
        name_gone(onto);
        int new = real_open(to, O_RDONLY | O_CLOEXEC);
        int copied = real_open(kept, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
        if (new < 0 || copied < 0 || fstat(new, &status)) give_up("the durable folder cannot be written");
        copy(new, copied, 0, status.st_size);
        real_close(new);
        real_close(copied);
    }
    pthread_mutex_unlock(&lock);
    return failed;
}

int rename(const char *from, const char *to)
{
    begin();
    int kind = kind_of(from), onto = kind_of(to);
    if (onto >= 0) return renamed_onto(from, to, kind, onto);
    if (kind < 0) return real_rename(from, to);
    pthread_mutex_lock(&lock);
    int failed = real_rename(from, to);
    if (!failed) {
        char kept[4200];
        path_of(kept, sizeof kept, durable, kind, "");
        name_gone(kind);
        real_unlink(kept);
    }
    pthread_mutex_unlock(&lock);
    return failed;
}
