/* Strikes a process at one of its storage calls, by preloading: the N-th that touches a path below a folder.

   cc -shared -fPIC -O1 -o faults.so faults.c -ldl
   LD_PRELOAD=faults.so python ...; then through ctypes: arm("/folder", n, kind), and later calls() and disarm().

   kind   0 count only; 1 SIGKILL; 2 SIGSTOP; 3 SIGSEGV; 4 _exit; 5 hang for ever; 6 half of the data, then SIGKILL;
          7 hold Python's interpreter lock for ever; 8 SIGTERM; 9 wait until the file <plan>.go stands;
          100 + e: every call from the N-th on fails with errno e; 1000 + e: this one alone does

   Processes that cannot be told so are told by a file. FAULTS_BELOW names the folder, FAULTS_PLAN the file: once it
   stands, "serial rank n kind", the process whose RANK that is counts from there, and at its n-th call renames the file
   to <plan>.struck and is struck. Such a process is also hit by signals: SIGRTMIN + 5 is 4, SIGRTMIN + 6 is 7.
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

static char folder[PATH_MAX], plan[PATH_MAX - 16], read_plan[128];
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

/* Holds the interpreter lock, which Python gives up around most storage calls, and never returns. */
static int hold(void *unused) {
    (void)unused;
    int (*ensure)(void) = (int (*)(void))dlsym(RTLD_DEFAULT, "PyGILState_Ensure");
    if (ensure) ensure();
    for (;;) pause();
    return 0;
}

static void beside_plan(char *path, size_t size, const char *ending) { snprintf(path, size, "%s.%s", plan, ending); }

static void wait_for_go(void) {
    char go[PATH_MAX];
    beside_plan(go, sizeof go, "go");
    while (access(go, F_OK) != 0) usleep(10000);
}

/* Arms this process by the plan that stands, once a plan; returns whether one stands for it. */
static int planned(void) {
    char text[sizeof read_plan] = "";
    int file = REAL(open)(plan, O_RDONLY);
    if (file < 0) return 0;
    ssize_t size = read(file, text, sizeof text - 1);
    close(file);
    long serial, rank, number;
    int what;
    const char *own = getenv("RANK");
    if (size <= 0 || sscanf(text, "%ld %ld %ld %d", &serial, &rank, &number, &what) != 4) return 0;
    if (!own || atol(own) != rank) return 0;
    if (strcmp(text, read_plan) != 0) {
        strcpy(read_plan, text);
        target = number, kind = what;
        __atomic_store_n(&seen, 0, __ATOMIC_SEQ_CST);
    }
    return 1;
}

/* Counts a call; returns 1 where it must fail (errno is set), 2 where half of its data must be written first. */
static int strike(int touches) {
    if (!touches || (plan[0] && !planned())) return 0;
    long number = __atomic_fetch_add(&seen, 1, __ATOMIC_SEQ_CST);
    if (kind >= 100 && kind < 1000 && number >= target) { errno = kind - 100; return 1; }
    if (number != target) return 0;
    if (plan[0]) {
        char struck[PATH_MAX];
        beside_plan(struck, sizeof struck, "struck");
        REAL(rename)(plan, struck);
    }
    switch (kind) {
        case 1: raise(SIGKILL); break;
        case 2: raise(SIGSTOP); break;
        case 3: signal(SIGSEGV, SIG_DFL); raise(SIGSEGV); break;
        case 4: _exit(9);
        case 5: for (;;) pause();
        case 6: return 2;
        case 7: hold(NULL);
        case 8: kill(getpid(), SIGTERM); break;
        case 9: wait_for_go(); break;
    }
    if (kind >= 1000) { errno = kind - 1000; return 1; }
    return 0;
}

static void leave(int number) { (void)number; _exit(9); }
static void hold_soon(int number) {
    (void)number;
    int (*add)(int (*)(void *), void *) = (int (*)(int (*)(void *), void *))dlsym(RTLD_DEFAULT, "Py_AddPendingCall");
    if (add) add(hold, NULL);
}

__attribute__((constructor)) static void heed_environment(void) {
    const char *below_here = getenv("FAULTS_BELOW"), *file = getenv("FAULTS_PLAN");
    if (!below_here || !file) return;
    snprintf(folder, sizeof folder, "%s", below_here);
    snprintf(plan, sizeof plan, "%s", file);
    signal(SIGRTMIN + 5, leave);
    signal(SIGRTMIN + 6, hold_soon);
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
