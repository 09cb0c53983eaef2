/* A PKCS#11 module that is another one, $TRIVET_REAL_MODULE, except for the faults that files in $TRIVET_FAULTS ask for.
 * A file works from the moment it is there until it is gone.
 *
 * A file named as a function, such as C_Sign or C_UnwrapKey, holds one rule:
 *
 *   [keys] [after] ACT [nth N | first N | every N]
 *
 *   delay US       it takes that many microseconds longer
 *   hang           it does not return while the file is there
 *   crash          the process dies of a write to address 0
 *   fail CODE      it returns CODE (C notation)
 *   flip           one bit of its output is wrong (C_Sign, C_WrapKey)
 *   other          (C_SignInit) another key of the same kind signs, if the token has one
 *
 * "after" lets the function do its work first: it is done, and reported as failed, or not at all. A failing C_Sign always
 * ends the operation, as the standard has it. "keys" is for C_SignInit and C_Sign: only for keys of groups, not for the
 * agent's own. Calls that only ask for the size of an output do not count. The calls that did since the rule was set are
 * counted by the length of the file's companion, C_Sign.calls, over all processes.
 *
 *   rate           at most so many signatures in a second, evenly
 *   lost           the token is gone: every function fails
 *   pin-locked     the user PIN is locked
 *   hang, slow, error, flip    C_Sign hangs, delay of so many microseconds, fail with that code, flip; for every key
 *   digests        every digest handed to C_Sign is appended to the file, in hex
 *   logins         one line is appended for every C_Login
 *   trace          the name of every function called is appended, one in each line, if the file is there */
#include <dirent.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

typedef unsigned long word; /* every argument and result of PKCS#11 fits in one */
typedef unsigned char byte;

/* Index in CK_FUNCTION_LIST, name, number of arguments. */
#define FUNCTIONS(F) \
	F(0, C_Initialize, 1) F(1, C_Finalize, 1) F(2, C_GetInfo, 1) F(4, C_GetSlotList, 3) F(5, C_GetSlotInfo, 2) \
	F(6, C_GetTokenInfo, 2) F(7, C_GetMechanismList, 3) F(8, C_GetMechanismInfo, 3) F(9, C_InitToken, 4) F(10, C_InitPIN, 3) \
	F(11, C_SetPIN, 5) F(12, C_OpenSession, 5) F(13, C_CloseSession, 1) F(14, C_CloseAllSessions, 1) F(15, C_GetSessionInfo, 2) \
	F(16, C_GetOperationState, 3) F(17, C_SetOperationState, 5) F(18, C_Login, 4) F(19, C_Logout, 1) F(20, C_CreateObject, 4) \
	F(21, C_CopyObject, 5) F(22, C_DestroyObject, 2) F(23, C_GetObjectSize, 3) F(24, C_GetAttributeValue, 4) \
	F(25, C_SetAttributeValue, 4) F(26, C_FindObjectsInit, 3) F(27, C_FindObjects, 4) F(28, C_FindObjectsFinal, 1) \
	F(29, C_EncryptInit, 3) F(30, C_Encrypt, 5) F(31, C_EncryptUpdate, 5) F(32, C_EncryptFinal, 3) F(33, C_DecryptInit, 3) \
	F(34, C_Decrypt, 5) F(35, C_DecryptUpdate, 5) F(36, C_DecryptFinal, 3) F(37, C_DigestInit, 2) F(38, C_Digest, 5) \
	F(39, C_DigestUpdate, 3) F(40, C_DigestKey, 2) F(41, C_DigestFinal, 3) F(42, C_SignInit, 3) F(43, C_Sign, 5) \
	F(44, C_SignUpdate, 3) F(45, C_SignFinal, 3) F(46, C_SignRecoverInit, 3) F(47, C_SignRecover, 5) F(48, C_VerifyInit, 3) \
	F(49, C_Verify, 5) F(50, C_VerifyUpdate, 3) F(51, C_VerifyFinal, 3) F(52, C_VerifyRecoverInit, 3) F(53, C_VerifyRecover, 5) \
	F(54, C_DigestEncryptUpdate, 5) F(55, C_DecryptDigestUpdate, 5) F(56, C_SignEncryptUpdate, 5) F(57, C_DecryptVerifyUpdate, 5) \
	F(58, C_GenerateKey, 5) F(59, C_GenerateKeyPair, 8) F(60, C_WrapKey, 6) F(61, C_UnwrapKey, 8) F(62, C_DeriveKey, 6) \
	F(63, C_SeedRandom, 3) F(64, C_GenerateRandom, 3) F(65, C_GetFunctionStatus, 1) F(66, C_CancelFunction, 1) \
	F(67, C_WaitForSlotEvent, 3)

#define INDEX(i, name, n) name##_ = i,
enum { FUNCTIONS(INDEX) GET_FUNCTION_LIST = 3, COUNT = 68 };

struct list {
	byte version[2];
	void *fn[COUNT];
};
static struct list faulty, *real;

/* call passes a call on. */
static word call(int f, int n, word *a) {
	void *fn = real->fn[f];
	switch (n) {
	case 1: return ((word(*)(word))fn)(a[0]);
	case 2: return ((word(*)(word, word))fn)(a[0], a[1]);
	case 3: return ((word(*)(word, word, word))fn)(a[0], a[1], a[2]);
	case 4: return ((word(*)(word, word, word, word))fn)(a[0], a[1], a[2], a[3]);
	case 5: return ((word(*)(word, word, word, word, word))fn)(a[0], a[1], a[2], a[3], a[4]);
	case 6: return ((word(*)(word, word, word, word, word, word))fn)(a[0], a[1], a[2], a[3], a[4], a[5]);
	default: return ((word(*)(word, word, word, word, word, word, word, word))fn)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]);
	}
}

#define CALL(f, ...) call(f, sizeof((word[]){__VA_ARGS__}) / sizeof(word), (word[]){__VA_ARGS__})

/* Files. */

static FILE *file(const char *name, const char *mode) {
	const char *dir = getenv("TRIVET_FAULTS");
	char path[4096];
	if (dir == NULL || snprintf(path, sizeof path, "%s/%s", dir, name) >= (int)sizeof path)
		return NULL;
	return fopen(path, mode);
}

/* listed tells whether the directory has a file of that name. It is looked at once in each function called, and read only
 * when it has changed: a signature asks many times. A change is older than the clock's tick before it is relied on. */
static __thread int looked;

static int listed(const char *name) {
	static pthread_rwlock_t lock = PTHREAD_RWLOCK_INITIALIZER;
	static char names[128][64];
	static struct timespec as_of;
	static int count, settled;
	const char *dir = getenv("TRIVET_FAULTS");
	struct timespec now;
	struct dirent *entry;
	struct stat st;
	int i, found = 0, known = looked;
	DIR *d;
	if (dir == NULL || !looked && stat(dir, &st) != 0)
		return 0;
	looked = 1;
	pthread_rwlock_rdlock(&lock);
	known = known || settled && st.st_mtim.tv_sec == as_of.tv_sec && st.st_mtim.tv_nsec == as_of.tv_nsec;
	for (i = 0; known && i < count && !found; i++)
		found = strcmp(names[i], name) == 0;
	pthread_rwlock_unlock(&lock);
	if (known)
		return found;
	pthread_rwlock_wrlock(&lock);
	clock_gettime(CLOCK_REALTIME, &now);
	as_of = st.st_mtim;
	settled = (now.tv_sec - as_of.tv_sec) * 1000000000L + now.tv_nsec - as_of.tv_nsec > 50000000L;
	count = 0;
	if ((d = opendir(dir)) != NULL) {
		while ((entry = readdir(d)) != NULL) {
			found |= strcmp(entry->d_name, name) == 0;
			if (count == 128 || strlen(entry->d_name) >= sizeof names[0])
				abort();
			strcpy(names[count++], entry->d_name);
		}
		closedir(d);
	}
	pthread_rwlock_unlock(&lock);
	return found;
}

/* content reads a file; 0 when there is none. */
static int content(const char *name, char *text, size_t size) {
	FILE *f = listed(name) ? file(name, "r") : NULL;
	size_t n;
	if (f == NULL)
		return 0;
	n = fread(text, 1, size - 1, f);
	text[n] = 0;
	fclose(f);
	return 1;
}

static void note(const char *name, const char *line) {
	FILE *f = file(name, "a");
	if (f != NULL) {
		fputs(line, f);
		fclose(f);
	}
}

/* Rules. */

struct rule {
	enum { NONE, DELAY, HANG, CRASH, FAIL, FLIP, OTHER } act;
	int keys, after;
	word argument;
	char when; /* of nth, first, every; 0 is always */
	word n;
};

static void misread(const char *name, const char *text) {
	fprintf(stderr, "faulty module: rule of %s not understood: %s\n", name, text);
	abort();
}

/* parse reads a rule; one that makes no sense ends the process, so that no test passes for want of a fault. */
static struct rule parse(const char *name, const char *whole) {
	static const char *acts[] = {"", "delay", "hang", "crash", "fail", "flip", "other"};
	struct rule r = {NONE};
	char text[256], *save = NULL, *w;
	snprintf(text, sizeof text, "%s", whole);
	for (w = strtok_r(text, " \t\n", &save); w != NULL; w = strtok_r(NULL, " \t\n", &save)) {
		word *number = NULL;
		int i;
		if (strcmp(w, "keys") == 0) {
			r.keys = 1;
		} else if (strcmp(w, "after") == 0) {
			r.after = 1;
		} else if (strcmp(w, "nth") == 0 || strcmp(w, "first") == 0 || strcmp(w, "every") == 0) {
			r.when = w[0];
			number = &r.n;
		} else {
			for (i = 1; i < 7 && strcmp(w, acts[i]) != 0; i++)
				;
			if (i == 7 || r.act != NONE)
				misread(name, whole);
			r.act = i;
			if (i == DELAY || i == FAIL)
				number = &r.argument;
		}
		if (number != NULL) {
			char *end = NULL;
			w = strtok_r(NULL, " \t\n", &save);
			*number = w != NULL ? strtoul(w, &end, 0) : 0;
			if (*number == 0 || *end != 0)
				misread(name, whole);
		}
	}
	if (r.act == NONE || r.keys && strncmp(name, "C_Sign", 6) != 0 || r.act == OTHER && strcmp(name, "C_SignInit") != 0 ||
		r.act == FLIP && strcmp(name, "C_Sign") != 0 && strcmp(name, "C_WrapKey") != 0)
		misread(name, whole);
	return r;
}

/* due counts a call and tells whether the rule is for it. */
static int due(const char *name, struct rule r) {
	char calls[64];
	struct stat st;
	word n = 0;
	FILE *f;
	snprintf(calls, sizeof calls, "%s.calls", name);
	if ((f = file(calls, "a")) != NULL) {
		/* One octet, at once: the file's length is the number of this call, unless another one is in between. */
		static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;
		pthread_mutex_lock(&one);
		fputc('.', f);
		fflush(f);
		if (fstat(fileno(f), &st) == 0)
			n = (word)st.st_size;
		pthread_mutex_unlock(&one);
		fclose(f);
	}
	switch (r.when) {
	case 'n': return n == r.n;
	case 'f': return n <= r.n;
	case 'e': return n % r.n == 0;
	}
	return 1;
}

static void hang(const char *name) {
	char text[256];
	while (content(name, text, sizeof text) && (strcmp(name, "hang") == 0 || strstr(text, "hang") != NULL)) {
		usleep(10000);
		looked = 0;
	}
}

static void crash(void) {
	volatile int *volatile nowhere = NULL;
	*nowhere = 0;
}

/* Keys. */

enum { CLASS = 0, TOKEN = 1, LABEL = 3, KEY_TYPE = 0x100, ID = 0x102, SIGN = 0x108, MODULUS = 0x120, EC_PARAMS = 0x180, PRIVATE_KEY = 3 };

struct attribute {
	word type;
	void *value;
	word length;
};

/* get reads one attribute; its length is 0 when there is none. */
static word get(word session, word object, word type, void *value, word size) {
	struct attribute a = {type, value, size};
	if (CALL(C_GetAttributeValue_, session, object, (word)&a, 1) != 0 || a.length > size)
		return 0;
	return a.length;
}

static int same(word session, word a, word b, word type) {
	byte va[1024], vb[1024];
	word na = get(session, a, type, va, sizeof va), nb = get(session, b, type, vb, sizeof vb);
	return na == nb && (type == MODULUS || memcmp(va, vb, na) == 0);
}

/* ours tells whether it is a key of a group. */
static int ours(word session, word object) {
	char label[256];
	word n = get(session, object, LABEL, label, sizeof label - 1);
	label[n] = 0;
	return strncmp(label, "trivet:", 7) == 0 && strncmp(label, "trivet:probe:", 13) != 0;
}

/* another is a key of the same kind, of a group if possible; 0 when there is none. */
static word another(word session, word key) {
	struct { word slot, state, flags, error; } info;
	word class = PRIVATE_KEY, kind = 0, mine = 0, found = 0, one, n;
	byte yes = 1;
	struct attribute like[] = {{CLASS, &class, sizeof class}, {KEY_TYPE, &kind, sizeof kind}, {SIGN, &yes, 1}, {TOKEN, &yes, 1}};
	if (get(session, key, KEY_TYPE, &kind, sizeof kind) == 0 || CALL(C_GetSessionInfo_, session, (word)&info) != 0 ||
		CALL(C_OpenSession_, info.slot, 4 | 2, 0, 0, (word)&mine) != 0)
		return 0;
	if (CALL(C_FindObjectsInit_, mine, (word)like, 4) == 0) {
		while (CALL(C_FindObjects_, mine, (word)&one, 1, (word)&n) == 0 && n == 1)
			if (!same(mine, one, key, ID) && same(mine, one, key, EC_PARAMS) && same(mine, one, key, MODULUS) && (found == 0 || ours(mine, one)))
				found = one;
		CALL(C_FindObjectsFinal_, mine);
	}
	CALL(C_CloseSession_, mine);
	return found;
}

static byte group_key[1 << 16]; /* by session: it signs with a key of a group now */

/* pace waits for the next turn of so many in a second. */
static void pace(double rate) {
	static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;
	static long long next;
	struct timespec t;
	long long now, turn;
	clock_gettime(CLOCK_MONOTONIC, &t);
	now = t.tv_sec * 1000000000LL + t.tv_nsec;
	pthread_mutex_lock(&one);
	turn = next > now ? next : now;
	next = turn + (long long)(1e9 / rate);
	pthread_mutex_unlock(&one);
	t.tv_sec = turn / 1000000000LL;
	t.tv_nsec = turn % 1000000000LL;
	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) != 0)
		;
}

/* signing is what the plain files ask of C_Sign before it works; a result other than 0 is what it returns. */
static word signing(word *a) {
	char text[64];
	double rate;
	if (content("rate", text, sizeof text)) {
		if ((rate = atof(text)) <= 0)
			misread("rate", text);
		pace(rate);
	}
	hang("hang");
	if (content("slow", text, sizeof text))
		usleep(strtoul(text, NULL, 0));
	if (content("error", text, sizeof text))
		return strtoul(text, NULL, 0) != 0 ? strtoul(text, NULL, 0) : 5;
	if (listed("digests")) {
		char line[2 * 64 + 2];
		word i, n = a[2] < 64 ? a[2] : 64;
		for (i = 0; i < n; i++)
			sprintf(line + 2 * i, "%02x", ((byte *)a[1])[i]);
		strcpy(line + 2 * n, "\n");
		note("digests", line);
	}
	return 0;
}

/* pass is every function. */
static word pass(int f, const char *name, int n, word *a) {
	char text[256];
	struct rule r = {NONE};
	byte *out = NULL;
	word *length = NULL, code, plain = 0;

	looked = 0;
	if (listed("trace")) {
		snprintf(text, sizeof text, "%s\n", name);
		note("trace", text);
	}
	if (f > C_GetInfo_ && listed("lost")) {
		if (f == C_GetSlotList_) {
			*(word *)a[2] = 0;
			return 0;
		}
		return f == C_GetTokenInfo_ || f == C_OpenSession_ ? 0xE0 : 0x32; /* TOKEN_NOT_PRESENT, DEVICE_REMOVED */
	}
	if (f == C_Login_) {
		snprintf(text, sizeof text, "user %lu\n", a[1]);
		note("logins", text);
		if (a[1] == 1 && listed("pin-locked"))
			return 0xA4;
	}
	if (f == C_Sign_ || f == C_WrapKey_) {
		out = (byte *)a[n - 2];
		length = (word *)a[n - 1];
		if (out == NULL)
			return call(f, n, a);
	}
	if (f == C_SignInit_)
		group_key[a[0] % sizeof group_key] = (listed("C_SignInit") || listed("C_Sign")) && ours(a[0], a[2]);
	if (content(name, text, sizeof text)) {
		r = parse(name, text);
		if (r.keys && !group_key[a[0] % sizeof group_key] || !due(name, r))
			r.act = NONE;
	}
	if (f == C_Sign_ && (plain = signing(a)) != 0) {
		r.act = FAIL;
		r.argument = plain;
	}
	if (r.act == OTHER && f == C_SignInit_) {
		word key = another(a[0], a[2]);
		a[2] = key != 0 ? key : a[2];
	}
	if (!r.after) {
		if (r.act == DELAY)
			usleep(r.argument);
		else if (r.act == HANG)
			hang(name);
		else if (r.act == CRASH)
			crash();
		else if (r.act == FAIL && f != C_Sign_)
			return r.argument;
	}
	code = call(f, n, a);
	if (f == C_GetTokenInfo_ && code == 0 && listed("pin-locked"))
		*(word *)(a[1] + 96) |= 0x40000; /* flags: USER_PIN_LOCKED */
	if (r.after) {
		if (r.act == DELAY)
			usleep(r.argument);
		else if (r.act == HANG)
			hang(name);
		else if (r.act == CRASH)
			crash();
	}
	if (code == 0 && out != NULL && *length > 0 && (r.act == FLIP || f == C_Sign_ && listed("flip")))
		out[*length - 1] ^= 1;
	if (r.act == FAIL) {
		if (f == C_Sign_ && code == 0)
			memset(out, 0, *length);
		return r.argument;
	}
	return code;
}

#define PARAMETERS_1 word a
#define PARAMETERS_2 PARAMETERS_1, word b
#define PARAMETERS_3 PARAMETERS_2, word c
#define PARAMETERS_4 PARAMETERS_3, word d
#define PARAMETERS_5 PARAMETERS_4, word e
#define PARAMETERS_6 PARAMETERS_5, word g
#define PARAMETERS_8 PARAMETERS_6, word h, word i
#define ARGUMENTS_1 a
#define ARGUMENTS_2 ARGUMENTS_1, b
#define ARGUMENTS_3 ARGUMENTS_2, c
#define ARGUMENTS_4 ARGUMENTS_3, d
#define ARGUMENTS_5 ARGUMENTS_4, e
#define ARGUMENTS_6 ARGUMENTS_5, g
#define ARGUMENTS_8 ARGUMENTS_6, h, i
#define WRAPPER(f, name, n) \
	static word faulty_##name(PARAMETERS_##n) { return pass(f, #name, n, (word[]){ARGUMENTS_##n}); }
FUNCTIONS(WRAPPER)

word C_GetFunctionList(struct list **out) {
	if (real == NULL) {
		const char *path = getenv("TRIVET_REAL_MODULE");
		void *module = path != NULL ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : NULL;
		word (*get)(struct list **) = module != NULL ? (word(*)(struct list **))dlsym(module, "C_GetFunctionList") : NULL;
		if (get == NULL || get(&real) != 0)
			return 5;
		memcpy(faulty.version, real->version, sizeof faulty.version);
		faulty.fn[GET_FUNCTION_LIST] = (void *)C_GetFunctionList;
#define INSTALL(f, name, n) faulty.fn[f] = (void *)faulty_##name;
		FUNCTIONS(INSTALL)
	}
	*out = &faulty;
	return 0;
}
