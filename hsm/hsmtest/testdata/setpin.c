/* Changes the user PIN of a token: setpin MODULE LABEL OLD NEW [PARAMETERS of C_Initialize] */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long word;
enum { INITIALIZE = 0, FINALIZE = 1, GET_SLOT_LIST = 4, GET_TOKEN_INFO = 6, SET_PIN = 11, OPEN_SESSION = 12, LOGIN = 18 };
struct list {
	unsigned char version[2];
	void *fn[68];
};

#define CALL(f, types, ...) ok(#f, ((word(*) types)list->fn[f])(__VA_ARGS__))

static void ok(const char *what, word code) {
	if (code != 0) {
		fprintf(stderr, "setpin: %s: 0x%lx\n", what, code);
		exit(1);
	}
}

int main(int argc, char **argv) {
	void *module = argc >= 5 ? dlopen(argv[1], RTLD_NOW) : NULL;
	word (*get)(struct list **) = module != NULL ? (word(*)(struct list **))dlsym(module, "C_GetFunctionList") : NULL;
	struct list *list;
	word slots[64], count = 64, i, session;
	struct { void *create, *destroy, *lock, *unlock; word flags; void *reserved; } arguments = {NULL, NULL, NULL, NULL, 2, argc > 5 ? argv[5] : NULL};
	if (get == NULL || get(&list) != 0) {
		fprintf(stderr, "usage: setpin MODULE LABEL OLD NEW [PARAMETERS]\n");
		return 2;
	}
	CALL(INITIALIZE, (void *), &arguments);
	CALL(GET_SLOT_LIST, (word, word *, word *), 1, slots, &count);
	for (i = 0; i < count; i++) {
		char info[1024], label[32];
		CALL(GET_TOKEN_INFO, (word, void *), slots[i], info);
		memset(label, ' ', sizeof label);
		memcpy(label, argv[2], strlen(argv[2]) < sizeof label ? strlen(argv[2]) : sizeof label);
		if (memcmp(info, label, sizeof label) != 0)
			continue;
		CALL(OPEN_SESSION, (word, word, void *, void *, word *), slots[i], 4 | 2, NULL, NULL, &session);
		CALL(LOGIN, (word, word, char *, word), session, 1, argv[3], strlen(argv[3]));
		CALL(SET_PIN, (word, char *, word, char *, word), session, argv[3], strlen(argv[3]), argv[4], strlen(argv[4]));
		CALL(FINALIZE, (void *), NULL);
		return 0;
	}
	fprintf(stderr, "setpin: no token is labelled %s\n", argv[2]);
	return 1;
}
