/* A PKCS#11 module that is another one ($TRIVET_REAL_MODULE) until the environment says TRIVET_DIE_AT=n: from then on it
 * counts the calls that change a token or a session, and the process dies, as by kill -9, just before the nth of them. */
#include <dlfcn.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

typedef unsigned long ulong;

/* CK_FUNCTION_LIST: a version, then 68 pointers in the standard's order. */
enum { GET_FUNCTION_LIST = 3, CREATE = 20, COPY = 21, DESTROY = 22, SET = 25, GENERATE = 58, GENERATE_PAIR = 59, UNWRAP = 61 };
struct list {
	unsigned char version[2];
	void *fn[68];
};

static struct list dying;
static struct list *real;
static long calls;

static void count(void) {
	const char *at = getenv("TRIVET_DIE_AT");
	if (at != NULL && __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST) == atol(at)) {
		kill(getpid(), SIGKILL);
		for (;;)
			pause();
	}
}

static ulong create(ulong s, void *t, ulong n, void *out) {
	count();
	return ((ulong(*)(ulong, void *, ulong, void *))real->fn[CREATE])(s, t, n, out);
}
static ulong copy(ulong s, ulong o, void *t, ulong n, void *out) {
	count();
	return ((ulong(*)(ulong, ulong, void *, ulong, void *))real->fn[COPY])(s, o, t, n, out);
}
static ulong destroy(ulong s, ulong o) {
	count();
	return ((ulong(*)(ulong, ulong))real->fn[DESTROY])(s, o);
}
static ulong set(ulong s, ulong o, void *t, ulong n) {
	count();
	return ((ulong(*)(ulong, ulong, void *, ulong))real->fn[SET])(s, o, t, n);
}
static ulong generate(ulong s, void *m, void *t, ulong n, void *out) {
	count();
	return ((ulong(*)(ulong, void *, void *, ulong, void *))real->fn[GENERATE])(s, m, t, n, out);
}
static ulong generate_pair(ulong s, void *m, void *t, ulong n, void *u, ulong k, void *a, void *b) {
	count();
	return ((ulong(*)(ulong, void *, void *, ulong, void *, ulong, void *, void *))real->fn[GENERATE_PAIR])(s, m, t, n, u, k, a, b);
}
static ulong unwrap(ulong s, void *m, ulong with, void *w, ulong len, void *t, ulong n, void *out) {
	count();
	return ((ulong(*)(ulong, void *, ulong, void *, ulong, void *, ulong, void *))real->fn[UNWRAP])(s, m, with, w, len, t, n, out);
}

ulong C_GetFunctionList(struct list **out) {
	if (real == NULL) {
		const char *path = getenv("TRIVET_REAL_MODULE");
		void *module = path != NULL ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
		ulong (*get)(struct list **) = module != NULL ? (ulong(*)(struct list **))dlsym(module, "C_GetFunctionList") : NULL;
		if (get == NULL || get(&real) != 0)
			return 5;
		dying = *real;
		dying.fn[GET_FUNCTION_LIST] = (void *)C_GetFunctionList;
		dying.fn[CREATE] = (void *)create;
		dying.fn[COPY] = (void *)copy;
		dying.fn[DESTROY] = (void *)destroy;
		dying.fn[SET] = (void *)set;
		dying.fn[GENERATE] = (void *)generate;
		dying.fn[GENERATE_PAIR] = (void *)generate_pair;
		dying.fn[UNWRAP] = (void *)unwrap;
	}
	*out = &dying;
	return 0;
}
