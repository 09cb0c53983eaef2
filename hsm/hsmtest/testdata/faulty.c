/* A PKCS#11 module that is another one, except for the faults that files in $TRIVET_FAULTS ask for:
 *   hang     C_Sign does not return while the file is there
 *   slow     C_Sign takes as many microseconds more as the file says
 *   error    C_Sign returns the number in the file (C notation)
 *   flip     C_Sign flips one bit of every signature
 *   digests  every digest handed to C_Sign is appended to the file, in hex
 *   logins   one line is appended for every C_Login
 * The real module is $TRIVET_REAL_MODULE. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long rv;
typedef unsigned long ulong;
typedef unsigned char byte;

/* CK_FUNCTION_LIST: a version, then 68 pointers in the standard's order. */
enum { FUNCTIONS = 68, GET_FUNCTION_LIST = 3, LOGIN = 18, SIGN = 43 };
struct list {
	byte version[2];
	void *fn[FUNCTIONS];
};

static struct list faulty;
static struct list *real;

static FILE *fault(const char *name, const char *mode) {
	const char *dir = getenv("TRIVET_FAULTS");
	char path[4096];
	if (dir == NULL)
		return NULL;
	snprintf(path, sizeof path, "%s/%s", dir, name);
	return fopen(path, mode);
}

static int wanted(const char *name) {
	FILE *f = fault(name, "r");
	if (f != NULL)
		fclose(f);
	return f != NULL;
}

static rv faulty_login(ulong session, ulong user, byte *pin, ulong len) {
	FILE *f = fault("logins", "a");
	if (f != NULL) {
		fprintf(f, "user %lu\n", user);
		fclose(f);
	}
	return ((rv(*)(ulong, ulong, byte *, ulong))real->fn[LOGIN])(session, user, pin, len);
}

static rv faulty_sign(ulong session, byte *data, ulong len, byte *sig, ulong *siglen) {
	FILE *f;
	unsigned long code = 0;
	while (wanted("hang"))
		usleep(10000);
	if ((f = fault("slow", "r")) != NULL) {
		if (fscanf(f, "%lu", &code) == 1)
			usleep(code);
		fclose(f);
	}
	if ((f = fault("error", "r")) != NULL) {
		if (fscanf(f, "%li", (long *)&code) != 1)
			code = 5;
		fclose(f);
		return code;
	}
	if (sig != NULL && wanted("digests") && (f = fault("digests", "a")) != NULL) {
		char line[2 * 64 + 2];
		ulong i, n = len < 64 ? len : 64;
		for (i = 0; i < n; i++)
			sprintf(line + 2 * i, "%02x", data[i]);
		fprintf(f, "%s\n", line);
		fclose(f);
	}
	code = ((rv(*)(ulong, byte *, ulong, byte *, ulong *))real->fn[SIGN])(session, data, len, sig, siglen);
	if (code == 0 && sig != NULL && *siglen > 0 && wanted("flip"))
		sig[*siglen - 1] ^= 1;
	return code;
}

rv C_GetFunctionList(struct list **out) {
	if (real == NULL) {
		const char *path = getenv("TRIVET_REAL_MODULE");
		void *module = path != NULL ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
		rv (*get)(struct list **) = module != NULL ? (rv(*)(struct list **))dlsym(module, "C_GetFunctionList") : NULL;
		if (get == NULL || get(&real) != 0)
			return 5;
		faulty = *real;
		faulty.fn[GET_FUNCTION_LIST] = (void *)C_GetFunctionList;
		faulty.fn[LOGIN] = (void *)faulty_login;
		faulty.fn[SIGN] = (void *)faulty_sign;
	}
	*out = &faulty;
	return 0;
}
