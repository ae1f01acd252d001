/* Makes one storage call of a process fail, by preloading: the N-th that touches a path below a folder.

   cc -shared -fPIC -O1 -o faults.so faults.c -ldl
   LD_PRELOAD=faults.so python ...; then through ctypes: arm("/folder", n, kind), and later calls() and disarm().

   kind   0 count only; 1 SIGKILL; 2 SIGSTOP; 3 SIGSEGV; 4 _exit; 5 hang for ever; 6 half of the data, then SIGKILL;
          100 + e: every call from the N-th on fails with errno e; 1000 + e: this one alone does
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long target = -1, seen = 0;
static int kind = 0;

void arm(const char *below, long n, int what) {
    snprintf(folder, sizeof folder, "%s", below);
    target = n, kind = what;
    __atomic_store_n(&seen, 0, __ATOMIC_SEQ_CST);
}
void disarm(void) { folder[0] = 0; }
long calls(void) { return __atomic_load_n(&seen, __ATOMIC_SEQ_CST); }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int below(const char *path) { return folder[0] && path && strncmp(path, folder, strlen(folder)) == 0; }

static int fd_below(int fd) {
    if (!folder[0]) return 0;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return below(path);
}

static int at_below(int fd, const char *path) { return path && path[0] == '/' ? below(path) : fd_below(fd); }

/* Counts a call; returns 1 where it must fail (errno is set), 2 where half of its data must be written first. */
static int strike(int touches) {
    if (!touches) return 0;
    long number = __atomic_fetch_add(&seen, 1, __ATOMIC_SEQ_CST);
    if (kind >= 100 && kind < 1000 && number >= target) { errno = kind - 100; return 1; }
    if (number != target) return 0;
    switch (kind) {
        case 1: raise(SIGKILL); break;
        case 2: raise(SIGSTOP); break;
        case 3: signal(SIGSEGV, SIG_DFL); raise(SIGSEGV); break;
        case 4: _exit(9);
        case 5: for (;;) pause();
        case 6: return 2;
    }
    if (kind >= 1000) { errno = kind - 1000; return 1; }
    return 0;
}

ssize_t write(int fd, const void *data, size_t size) {
    int hit = strike(fd_below(fd));
    if (hit == 1) return -1;
    if (hit == 2) { REAL(write)(fd, data, size / 2); raise(SIGKILL); }
    return REAL(write)(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    int hit = strike(fd_below(fd));
    if (hit == 1) return -1;
    if (hit == 2) { REAL(writev)(fd, parts, count > 1 ? count / 2 : 1); raise(SIGKILL); }
    return REAL(writev)(fd, parts, count);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    int hit = strike(fd_below(fd));
    if (hit == 1) return -1;
    if (hit == 2) { REAL(pwrite)(fd, data, size / 2, at); raise(SIGKILL); }
    return REAL(pwrite)(fd, data, size, at);
}
#define PLAIN(returns, name, touches, declared, passed) \
    returns name declared { \
        int hit = strike(touches); \
        if (hit == 1) return -1; \
        if (hit == 2) raise(SIGKILL); \
        return REAL(name) passed; \
    }
PLAIN(int, fsync, fd_below(fd), (int fd), (fd))
PLAIN(int, fdatasync, fd_below(fd), (int fd), (fd))
PLAIN(int, ftruncate, fd_below(fd), (int fd, off_t size), (fd, size))
PLAIN(int, rename, below(to), (const char *from, const char *to), (from, to))
PLAIN(int, renameat, at_below(tofd, to), (int fd, const char *from, int tofd, const char *to), (fd, from, tofd, to))
PLAIN(int, link, below(to), (const char *from, const char *to), (from, to))
PLAIN(int, linkat, at_below(tofd, to), (int fd, const char *from, int tofd, const char *to, int flags), (fd, from, tofd, to, flags))
PLAIN(int, unlink, below(path), (const char *path), (path))
PLAIN(int, unlinkat, at_below(fd, path), (int fd, const char *path, int flags), (fd, path, flags))
PLAIN(int, rmdir, below(path), (const char *path), (path))
PLAIN(int, mkdir, below(path), (const char *path, mode_t mode), (path, mode))
PLAIN(int, mkdirat, at_below(fd, path), (int fd, const char *path, mode_t mode), (fd, path, mode))

#define OPEN(name, path_below, declared, passed) \
    int name declared { \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); } \
        int hit = (flags & O_CREAT) ? strike(path_below) : 0; \
        if (hit == 1) return -1; \
        if (hit == 2) raise(SIGKILL); \
        return REAL(name) passed; \
    }
OPEN(open, below(path), (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, below(path), (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, at_below(fd, path), (int fd, const char *path, int flags, ...), (fd, path, flags, mode))
OPEN(openat64, at_below(fd, path), (int fd, const char *path, int flags, ...), (fd, path, flags, mode))
