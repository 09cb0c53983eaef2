package pkcs11

/*
#cgo LDFLAGS: -ldl
#include <dlfcn.h>
#include <stdlib.h>

typedef unsigned long ck_ulong;

// struct function_list is CK_FUNCTION_LIST: a version, then the functions in the standard's order.
struct function_list {
	unsigned char version[2];
	void *function[68];
};
enum { WRAP_KEY = 60 };

struct mechanism { ck_ulong kind; void *parameter; ck_ulong length; };
struct oaep { ck_ulong hash, mgf, source; void *data; ck_ulong length; };

static void *trivet_wrap_key(void *module) {
	ck_ulong (*get)(struct function_list **) = (ck_ulong (*)(struct function_list **))dlsym(module, "C_GetFunctionList");
	struct function_list *list;
	if (get == NULL || get(&list) != 0)
		return NULL;
	return list->function[WRAP_KEY];
}

static ck_ulong trivet_wrap(void *fn, ck_ulong session, ck_ulong kind, ck_ulong with, ck_ulong key, void *out, ck_ulong *length, int oaep) {
	struct oaep p = { 0x220, 1, 1, NULL, 0 }; // CKM_SHA_1, CKG_MGF1_SHA1, CKZ_DATA_SPECIFIED
	struct mechanism m = { kind, NULL, 0 };
	if (oaep) {
		m.parameter = &p;
		m.length = sizeof p;
	}
	return ((ck_ulong (*)(ck_ulong, struct mechanism *, ck_ulong, ck_ulong, void *, ck_ulong *))fn)(session, &m, with, key, out, length);
}
*/
import "C"

import (
	"errors"
	"fmt"
	"strings"
	"unsafe"

	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
)

// module is a loaded and initialised PKCS#11 library: miekg's context, and C_WrapKey without the query for the result's
// size, which NSS answers with an error.
type module struct {
	*p11.Ctx
	profile Profile
	handle  unsafe.Pointer
	wrapKey unsafe.Pointer
}

// moduleConfig says what to load.
type moduleConfig struct{ path, profile, dir, label string }

// load loads and initialises a module. It is told its profile, or finds out.
func load(cfg moduleConfig) (*module, error) {
	path := C.CString(cfg.path)
	defer C.free(unsafe.Pointer(path))
	m := &module{Ctx: p11.New(cfg.path)}
	if m.Ctx != nil {
		if m.handle = C.dlopen(path, C.RTLD_LAZY); m.handle != nil {
			m.wrapKey = C.trivet_wrap_key(m.handle)
		}
	}
	if m.wrapKey == nil {
		m.unload()
		return nil, hsm.Errorf(hsm.ClassDevice, "open", "loading module %s: it is missing or no PKCS#11 library", cfg.path)
	}
	if err := m.initialize(cfg); err != nil {
		m.unload()
		return nil, err
	}
	return m, nil
}

// initialize calls C_Initialize as the profile wants it. A module of unknown profile is first called as the standard
// says; one that refuses that is one that wants to be told its directory.
func (m *module) initialize(cfg moduleConfig) error {
	const op = "open"
	if cfg.profile != "" {
		p, err := profileNamed(cfg.profile)
		if err != nil {
			return err
		}
		m.profile = p
		return m.start(cfg)
	}
	err := m.start(cfg)
	if is(err, p11.CKR_ARGUMENTS_BAD) && cfg.dir != "" {
		m.profile = nss
		err = m.start(cfg)
	}
	if err != nil {
		return err
	}
	info, err := m.GetInfo()
	if err != nil {
		return classify(op, err)
	}
	m.profile = profileOf(info.ManufacturerID)
	return nil
}

func (m *module) start(cfg moduleConfig) error {
	var options []p11.InitializeOption
	if m.profile.Directory {
		arguments, err := directoryArguments(cfg.dir, cfg.label)
		if err != nil {
			return err
		}
		s := C.CString(arguments)
		defer C.free(unsafe.Pointer(s))
		options = append(options, p11.InitializeWithReserved(unsafe.Pointer(s)))
	}
	// A module that crypto11 has initialised already is as good as one initialised here.
	if err := m.Initialize(options...); err != nil && !is(err, p11.CKR_CRYPTOKI_ALREADY_INITIALIZED) {
		return classify("open", fmt.Errorf("initialising module %s: %w", cfg.path, err))
	}
	return nil
}

// directoryArguments are NSS's parameters: where the token is and what it is called.
func directoryArguments(dir, label string) (string, error) {
	if dir == "" {
		return "", hsm.Errorf(hsm.ClassRequest, "open", "this module must be told its token's directory (token_dir)")
	}
	if strings.ContainsAny(dir+label, `'"\<>[]=`) {
		return "", hsm.Errorf(hsm.ClassRequest, "open", "directory %q or label %q holds a character that the module's parameters cannot", dir, label)
	}
	return fmt.Sprintf("configdir='sql:%s' certPrefix='' keyPrefix='' secmod='secmod.db' flags='' dbTokenDescription='%s'", dir, label), nil
}

// close finalises the module and unloads it.
func (m *module) close() error {
	err := m.Finalize()
	m.unload()
	return classify("close", err)
}

// unload leaves the module initialised: crypto11 has finalised it, or C_Initialize has failed.
func (m *module) unload() {
	m.Destroy()
	if m.handle != nil {
		C.dlclose(m.handle)
		m.handle = nil
	}
}

// wrap is C_WrapKey with room enough for every key there is.
func (m *module) wrap(session p11.SessionHandle, mechanism uint, with, key p11.ObjectHandle) ([]byte, error) {
	out := make([]byte, hsm.MaxBlob)
	length := C.ck_ulong(len(out))
	isOAEP := C.int(0)
	if mechanism == p11.CKM_RSA_PKCS_OAEP {
		isOAEP = 1
	}
	code := C.trivet_wrap(m.wrapKey, C.ck_ulong(session), C.ck_ulong(mechanism), C.ck_ulong(with), C.ck_ulong(key), unsafe.Pointer(&out[0]), &length, isOAEP)
	if code != 0 {
		return nil, p11.Error(code)
	}
	if length == 0 || int(length) > len(out) {
		return nil, p11.Error(p11.CKR_DEVICE_ERROR)
	}
	return out[:length], nil
}

// unwrap is C_UnwrapKey. It never hands the module nothing, which miekg answers with a panic.
func (m *module) unwrap(session p11.SessionHandle, mechanism uint, with p11.ObjectHandle, wrapped []byte, template []*p11.Attribute) (p11.ObjectHandle, error) {
	if len(wrapped) == 0 {
		return 0, p11.Error(p11.CKR_WRAPPED_KEY_LEN_RANGE)
	}
	how := p11.NewMechanism(mechanism, nil)
	if mechanism == p11.CKM_RSA_PKCS_OAEP {
		how = p11.NewMechanism(mechanism, p11.NewOAEPParams(p11.CKM_SHA_1, p11.CKG_MGF1_SHA1, p11.CKZ_DATA_SPECIFIED, nil))
	}
	return m.UnwrapKey(session, []*p11.Mechanism{how}, with, wrapped, template)
}

// offers tells whether the module has a mechanism for those uses.
func (m *module) offers(slot, mechanism, uses uint) bool {
	info, err := m.GetMechanismInfo(slot, []*p11.Mechanism{p11.NewMechanism(mechanism, nil)})
	return err == nil && info.Flags&uses == uses
}

// tokenCalled gives the slot of the one token with that label; ClassNotFound where there is none.
func (m *module) tokenCalled(label string) (uint, p11.TokenInfo, error) {
	slots, err := m.GetSlotList(true)
	if err != nil {
		return 0, p11.TokenInfo{}, classify("open", err)
	}
	var slot uint
	var info p11.TokenInfo
	found := 0
	for _, s := range slots {
		i, err := m.GetTokenInfo(s)
		if err != nil {
			return 0, info, classify("open", err)
		}
		if i.Label == label && (m.profile.EmptySO || i.Flags&p11.CKF_TOKEN_INITIALIZED != 0) {
			slot, info = s, i
			found++
		}
	}
	switch found {
	case 0:
		return 0, info, hsm.Errorf(hsm.ClassNotFound, "open", "no token is labelled %q in any of %d slots: check the label, or run hsmd init-token", label, len(slots))
	case 1:
		return slot, info, nil
	}
	return 0, info, hsm.Errorf(hsm.ClassRequest, "open", "%d tokens are labelled %q: labels must be unique", found, label)
}

// usableToken is tokenCalled for a token that can be logged in to without locking it.
func (m *module) usableToken(label string) (uint, p11.TokenInfo, error) {
	slot, info, err := m.tokenCalled(label)
	if err != nil {
		return 0, info, err
	}
	switch {
	case info.Flags&p11.CKF_USER_PIN_LOCKED != 0:
		err = hsm.Errorf(hsm.ClassPIN, "login", "the user PIN of token %s is locked: the security officer must set a new one", label)
	case info.Flags&p11.CKF_USER_PIN_FINAL_TRY != 0:
		err = hsm.Errorf(hsm.ClassPIN, "login", "one more wrong PIN locks token %s: an operator must log in by hand once, then restart", label)
	case info.Flags&p11.CKF_USER_PIN_INITIALIZED == 0:
		err = hsm.Errorf(hsm.ClassPIN, "login", "token %s has no user PIN yet: run hsmd init-token", label)
	}
	return slot, info, err
}

// find lists the token's objects that match; session objects, such as NSS's signing copies, are none of them. A session
// whose login is gone sees no private objects, which must not look like a token without any: it is an error.
func (t *Token) find(match ...attribute) (objects []p11.ObjectHandle, err error) {
	return find(t.raw.Ctx, t.session, match...)
}

func find(ctx *p11.Ctx, session p11.SessionHandle, match ...attribute) (objects []p11.ObjectHandle, err error) {
	if err := ctx.FindObjectsInit(session, template(match, []attribute{{p11.CKA_TOKEN, true}})); err != nil {
		return nil, fmt.Errorf("finding objects: %w", err)
	}
	defer func() { err = errors.Join(err, ctx.FindObjectsFinal(session)) }()
	for {
		some, _, err := ctx.FindObjects(session, 100)
		if err != nil {
			return nil, fmt.Errorf("finding objects: %w", err)
		}
		if len(some) == 0 {
			break
		}
		objects = append(objects, some...)
	}
	info, err := ctx.GetSessionInfo(session)
	if err == nil && info.State != p11.CKS_RO_USER_FUNCTIONS && info.State != p11.CKS_RW_USER_FUNCTIONS {
		err = p11.Error(p11.CKR_USER_NOT_LOGGED_IN)
	}
	return objects, err
}

// read gives the values of attributes that every object of the kind has.
func (t *Token) read(object p11.ObjectHandle, kinds ...uint) ([][]byte, error) {
	ask := make([]*p11.Attribute, len(kinds))
	for i, k := range kinds {
		ask[i] = p11.NewAttribute(k, nil)
	}
	got, err := t.raw.GetAttributeValue(t.session, object, ask)
	if err != nil {
		return nil, fmt.Errorf("reading attributes: %w", err)
	}
	out := make([][]byte, len(got))
	for i, a := range got {
		out[i] = a.Value
	}
	return out, nil
}

// object is one in the token, with what is known of its attributes.
type object struct {
	t      *Token
	handle p11.ObjectHandle
	known  map[uint][]byte
}

// object knows nothing of it yet, but for attributes asked for ahead: those that are sure to be asked for are had in one call,
// since a call has its price whatever it asks for (SoftHSM opens the object's file dozens of times). An object that has not all
// of them is asked as far as need be, and then says what is wrong with it.
func (t *Token) object(handle p11.ObjectHandle, ahead ...uint) object {
	o := object{t: t, handle: handle}
	if len(ahead) > 0 {
		if v, err := t.read(handle, ahead...); err == nil {
			o.known = make(map[uint][]byte, len(ahead))
			for i, kind := range ahead {
				o.known[kind] = v[i]
			}
		}
	}
	return o
}

// read is Token.read, of what is not known yet.
func (o object) read(kinds ...uint) ([][]byte, error) {
	out := make([][]byte, len(kinds))
	for i, kind := range kinds {
		v, ok := o.known[kind]
		if !ok {
			return o.t.read(o.handle, kinds...)
		}
		out[i] = v
	}
	return out, nil
}

// remove destroys objects, in that order.
func (t *Token) remove(objects ...p11.ObjectHandle) error {
	for _, o := range objects {
		if err := t.raw.DestroyObject(t.session, o); err != nil {
			return fmt.Errorf("destroying an object: %w", err)
		}
	}
	return nil
}
