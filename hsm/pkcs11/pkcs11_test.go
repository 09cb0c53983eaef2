package pkcs11_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
	"trivet/hsm/hsmtest"
	"trivet/hsm/pkcs11"
)

func TestTokenKeepsTheContract(t *testing.T) {
	each(t, func(t *testing.T, k *kind) {
		cfg, _ := k.fresh(t)
		c := hsmtest.Contract{Token: hsmtest.Direct(open(t, cfg))}
		if k == softHSM { // the other has no Ed25519
			c.Algorithms = hsm.Algorithms()
		}
		c.Run(t)
	})
}

func TestImportRestoresALostKeyWhole(t *testing.T) {
	each(t, func(t *testing.T, m *kind) {
		cfg, _ := m.fresh(t)
		token := open(t, cfg)
		k, b := exported(t, token)
		if err := token.DestroyHalves(k.ID, p11.CKO_PRIVATE_KEY, p11.CKO_PUBLIC_KEY); err != nil {
			t.Fatal(err)
		}
		if _, err := token.Inventory(); err != nil {
			t.Fatal(err)
		}
		_, err := token.Key(k.ID)
		hsmtest.WantClass(t, err, hsm.ClassNotFound)

		clone, err := token.Import(b)
		if err != nil {
			t.Fatal(err)
		}
		if clone.Attributes != k.Attributes || !bytes.Equal(clone.SPKI, k.SPKI) || clone.Local || !clone.Extractable {
			t.Errorf("clone %+v of %+v", clone, k)
		}
		objects(t, token, k.ID, 2)
		hsmtest.SignAndVerify(t, hsmtest.Direct(token), clone, 3)
	})
}

func TestImportCompletesAKeyWithoutItsPublicHalf(t *testing.T) {
	each(t, func(t *testing.T, m *kind) {
		cfg, _ := m.fresh(t)
		token := open(t, cfg)
		k, b := exported(t, token)
		if err := token.DestroyHalves(k.ID, p11.CKO_PUBLIC_KEY); err != nil {
			t.Fatal(err)
		}
		list, err := token.Inventory()
		if err != nil {
			t.Fatal(err)
		}
		if i := slices.IndexFunc(list, func(r hsm.KeyRecord) bool { return r.ID == k.ID }); i < 0 || list[i].Fault == "" {
			t.Errorf("half a key is listed as whole: %+v", list)
		}
		_, err = token.Sign(k.ID, make([]byte, 32))
		hsmtest.WantClass(t, err, hsm.ClassNotFound)
		whole, err := token.Import(b)
		if err != nil {
			t.Fatal(err)
		}
		objects(t, token, k.ID, 2)
		hsmtest.SignAndVerify(t, hsmtest.Direct(token), whole, 1)
	})
}

func TestImportRemovesOnlyWhatItMade(t *testing.T) {
	each(t, func(t *testing.T, m *kind) {
		cfg, _ := m.fresh(t)
		token := open(t, cfg)
		k, b := exported(t, token)
		other, err := token.Generate(hsmtest.Spec("other", hsm.PurposeCA))
		if err != nil {
			t.Fatal(err)
		}

		// An authenticated blob whose key and SPKI do not belong together: unwraps, fails its signature, is removed.
		wrong := b
		wrong.ID, wrong.SPKI = hsm.NewKeyID(), other.SPKI
		if wrong, err = token.Rewrap(wrong); err != nil {
			t.Fatal(err)
		}
		_, err = token.Import(wrong)
		hsmtest.WantClass(t, err, hsm.ClassRequest)
		objects(t, token, wrong.ID, 0)

		// Rubbish that is authenticated all the same.
		wrong.Wrapped = make([]byte, 64)
		if wrong, err = token.Rewrap(wrong); err != nil {
			t.Fatal(err)
		}
		_, err = token.Import(wrong)
		hsmtest.WantClass(t, err, hsm.ClassRequest)
		objects(t, token, wrong.ID, 0)

		// An id that is taken by another key: refused, and that key is as it was.
		taken := b
		taken.ID, taken.Label = other.ID, other.Label
		if taken, err = token.Rewrap(taken); err != nil {
			t.Fatal(err)
		}
		_, err = token.Import(taken)
		hsmtest.WantClass(t, err, hsm.ClassRequest)
		objects(t, token, other.ID, 2)
		hsmtest.SignAndVerify(t, hsmtest.Direct(token), other, 1)
		hsmtest.SignAndVerify(t, hsmtest.Direct(token), k, 1)
	})
}

func TestPrivateKeysObeyThePolicy(t *testing.T) {
	cfg, _ := fresh(t)
	token := open(t, cfg)
	k, b := exported(t, token)
	check := func(name string) {
		t.Helper()
		for kind, want := range map[uint]byte{
			p11.CKA_TOKEN: 1, p11.CKA_PRIVATE: 1, p11.CKA_SENSITIVE: 1, p11.CKA_SIGN: 1, p11.CKA_EXTRACTABLE: 1,
			p11.CKA_DECRYPT: 0, p11.CKA_UNWRAP: 0, p11.CKA_DERIVE: 0, p11.CKA_MODIFIABLE: 0, p11.CKA_COPYABLE: 0, p11.CKA_SIGN_RECOVER: 0,
		} {
			if v, err := token.Attribute(k.ID, kind); err != nil || len(v) != 1 || v[0] != want {
				t.Errorf("%s: attribute 0x%X is %v, %v; want %d", name, kind, v, err, want)
			}
		}
		if v, err := token.Attribute(k.ID, p11.CKA_VALUE); err == nil && len(v) > 0 {
			t.Errorf("%s: the private value can be read", name)
		}
		for kind, value := range map[uint]any{p11.CKA_DECRYPT: true, p11.CKA_MODIFIABLE: true, p11.CKA_LABEL: []byte("trivet:ocsp:x"), p11.CKA_ID: []byte("0123456789abcdef")} {
			if err := token.SetAttribute(k.ID, kind, value); err == nil {
				t.Errorf("%s: attribute 0x%X could be changed", name, kind)
			}
		}
	}
	check("generated")
	if err := token.DestroyHalves(k.ID, p11.CKO_PRIVATE_KEY, p11.CKO_PUBLIC_KEY); err != nil {
		t.Fatal(err)
	}
	if _, err := token.Import(b); err != nil {
		t.Fatal(err)
	}
	check("imported")

	probe := token.Probe()
	if probe.Extractable {
		t.Error("the probe key is extractable")
	}
	_, err := token.Export(probe.ID, "")
	hsmtest.WantClass(t, err, hsm.ClassRequest)
}

func TestForeignObjectsAreReportedAndNeverUsed(t *testing.T) {
	each(t, func(t *testing.T, m *kind) {
		cfg, _ := m.fresh(t)
		token := open(t, cfg)
		id := hsm.NewKeyID()
		planted := id
		for _, label := range []string{"somebody's", "trivet:root:x"} {
			raw, err := id.Bytes()
			must(t, err)
			must(t, token.Plant(label, raw))
			id = hsm.NewKeyID()
		}
		list, err := token.Inventory()
		if err != nil {
			t.Fatal(err)
		}
		foreign := 0
		for _, k := range list {
			if k.Foreign {
				foreign++
				if k.Purpose != "" {
					t.Errorf("a foreign key has a purpose: %+v", k)
				}
			}
		}
		if foreign != 4 {
			t.Errorf("%d foreign objects, want 4: %+v", foreign, list)
		}
		_, err = token.Sign(planted, make([]byte, 32))
		hsmtest.WantClass(t, err, hsm.ClassNotFound)
		if i := token.Info(); i.Keys != 0 || i.Foreign != 4 || i.Faulty != 0 {
			t.Errorf("%+v", i)
		}
	})
}

func TestKeysAndDomainSurviveReopening(t *testing.T) {
	each(t, func(t *testing.T, m *kind) {
		cfg, _ := m.fresh(t)
		first, err := pkcs11.Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		k, b := exported(t, first)
		info, probe := first.Info(), first.Probe()
		if err := first.Close(); err != nil {
			t.Fatal(err)
		}
		again := open(t, cfg)
		if fmt.Sprintf("%+v", again.Info()) != fmt.Sprintf("%+v", info) || info.KEK != "kek-1" || info.Keys != 1 || again.Probe().ID != probe.ID {
			t.Errorf("%+v, then %+v", info, again.Info())
		}
		hsmtest.SignAndVerify(t, hsmtest.Direct(again), k, 1)
		if _, err := again.Import(b); err != nil {
			t.Error(err)
		}
	})
}

func TestInitTouchesNoInitialisedToken(t *testing.T) {
	each(t, func(t *testing.T, m *kind) {
		cfg, init := m.fresh(t)
		token, err := pkcs11.Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		k, _ := exported(t, token)
		if err := token.Close(); err != nil {
			t.Fatal(err)
		}
		for _, change := range []func(*pkcs11.InitConfig){
			func(*pkcs11.InitConfig) {},
			func(c *pkcs11.InitConfig) { // other PINs make no difference to a token that is there
				c.PINFile = filepath.Join(t.TempDir(), "pin")
				hsmtest.Write(t, c.PINFile, "9999")
			},
		} {
			c := init
			change(&c)
			if made, err := pkcs11.Init(c); err != nil || made {
				t.Errorf("made %v, %v", made, err)
			}
		}
		hsmtest.SignAndVerify(t, hsmtest.Direct(open(t, cfg)), k, 1)
	})
}

func TestPINFilesOpenToEverybodyAreRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pin")
	for content, ok := range map[string]bool{"1234": true, "1234\n": true, "1234\r\n": true, "": false, "\n": false, "12\n34": false, "12\x0034": false, strings.Repeat("1", 257): false} {
		hsmtest.Write(t, path, content)
		if pin, err := pkcs11.ReadPIN(path); (err == nil) != ok || ok && pin != "1234" {
			t.Errorf("%q: %q, %v", content, pin, err)
		}
	}
	hsmtest.Write(t, path, "1234")
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := pkcs11.ReadPIN(path); err == nil {
		t.Error("a PIN file open to everybody was read")
	}
	t.Setenv("CREDENTIALS_DIRECTORY", filepath.Dir(path))
	if got := pkcs11.PINPath("pin"); got != path {
		t.Errorf("credential pin is at %s", got)
	}
	if got := pkcs11.PINPath("/etc/pin"); got != "/etc/pin" {
		t.Errorf("path moved to %s", got)
	}
}

func TestAWrongPINIsItsOwnClass(t *testing.T) {
	each(t, func(t *testing.T, m *kind) {
		cfg, _ := m.fresh(t)
		hsmtest.Write(t, cfg.PINFile, "4321")
		_, err := pkcs11.Open(cfg)
		hsmtest.WantClass(t, err, hsm.ClassPIN)
		hsmtest.Write(t, cfg.PINFile, "1234")
		open(t, cfg)
	})
}

func TestModuleCodesHaveTheirClass(t *testing.T) {
	for code, class := range map[uint]hsm.Class{
		p11.CKR_SESSION_HANDLE_INVALID: hsm.ClassSession, p11.CKR_OBJECT_HANDLE_INVALID: hsm.ClassSession, p11.CKR_USER_NOT_LOGGED_IN: hsm.ClassSession,
		p11.CKR_DEVICE_ERROR: hsm.ClassDevice, p11.CKR_DEVICE_REMOVED: hsm.ClassDevice, p11.CKR_TOKEN_NOT_PRESENT: hsm.ClassDevice,
		p11.CKR_GENERAL_ERROR: hsm.ClassDevice, p11.CKR_FUNCTION_FAILED: hsm.ClassDevice, p11.CKR_CRYPTOKI_NOT_INITIALIZED: hsm.ClassDevice,
		p11.CKR_MECHANISM_INVALID: hsm.ClassRequest, p11.CKR_DATA_LEN_RANGE: hsm.ClassRequest, p11.CKR_ARGUMENTS_BAD: hsm.ClassRequest,
		p11.CKR_PIN_INCORRECT: hsm.ClassPIN, p11.CKR_PIN_LOCKED: hsm.ClassPIN, 0x80000042: hsm.ClassDevice,
	} {
		err := pkcs11.Classify(code)
		if hsm.ClassOf(err) != class {
			t.Errorf("0x%X: %v, want class %s", code, err, class)
		}
	}
	if msg := pkcs11.Classify(p11.CKR_DEVICE_ERROR).Error(); !strings.Contains(msg, "CKR_DEVICE_ERROR") {
		t.Errorf("message %q", msg)
	}
}

// FuzzImport hands the token blobs with octets of the fuzzer's choice; the module must survive all of them.
func FuzzImport(f *testing.F) {
	module, dir := hsmtest.Module(f), f.TempDir()
	f.Setenv("SOFTHSM2_CONF", hsmtest.SoftHSM(f, dir))
	pin := filepath.Join(dir, "pin")
	hsmtest.Write(f, pin, "1234")
	if _, err := pkcs11.Init(pkcs11.InitConfig{Module: module, TokenLabel: "fuzz", PINFile: pin, SOPINFile: pin}); err != nil {
		f.Fatal(err)
	}
	token, err := pkcs11.Open(pkcs11.Config{Module: module, TokenLabel: "fuzz", PINFile: pin})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = token.Close() })
	k, err := token.Generate(hsmtest.Spec("fuzz", hsm.PurposeCA))
	if err != nil {
		f.Fatal(err)
	}
	if err := token.GenerateDomain("fuzz"); err != nil {
		f.Fatal(err)
	}
	b, err := token.Export(k.ID, "")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b.Wrapped, b.SPKI)
	f.Add([]byte{}, []byte{})
	f.Add(b.Wrapped[:24], b.SPKI)
	f.Fuzz(func(t *testing.T, wrapped, spki []byte) {
		if bytes.Equal(wrapped, b.Wrapped) && bytes.Equal(spki, b.SPKI) {
			return
		}
		c := b
		c.ID, c.Wrapped, c.SPKI = hsm.NewKeyID(), wrapped, spki
		c, err := token.Rewrap(c)
		if err != nil {
			t.Fatal(err)
		}
		_, err = token.Import(c)
		hsmtest.WantClass(t, err, hsm.ClassRequest)
		objects(t, token, c.ID, 0)
	})
}
