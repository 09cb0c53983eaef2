package pkcs11_test

import (
	"strings"
	"testing"

	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
	"trivet/hsm/hsmtest"
	"trivet/hsm/pkcs11"
)

// Keys go from one vendor's token to the other's and back, and are the same keys there.
func TestKeysAreClonedBetweenVendors(t *testing.T) {
	for _, way := range []struct {
		from, to   *kind
		algorithms []hsm.Algorithm
	}{
		{softHSM, nss, []hsm.Algorithm{hsm.P256, hsm.P384, hsm.RSA2048, hsm.RSA4096}},
		{nss, softHSM, []hsm.Algorithm{hsm.P256, hsm.P384, hsm.RSA3072}},
	} {
		t.Run(way.from.name+" to "+way.to.name, func(t *testing.T) {
			fromCfg, _ := way.from.fresh(t)
			toCfg, _ := way.to.fresh(t)
			from, to := open(t, fromCfg), open(t, toCfg)

			// Two domains of one name are not one domain.
			must(t, from.GenerateDomain("kek-1"))
			must(t, to.GenerateDomain("kek-1"))
			k, err := from.Generate(hsmtest.Spec("clone", hsm.PurposeCA))
			must(t, err)
			b, err := from.Export(k.ID, "")
			must(t, err)
			_, err = to.Import(b)
			hsmtest.WantClass(t, err, hsm.ClassRequest)
			objects(t, to, k.ID, 0)
			transport, err := to.TransportKey()
			must(t, err)
			wrapped, kek, err := from.ExportDomain("kek-1", transport)
			must(t, err)
			hsmtest.WantClass(t, to.ImportDomain(kek, wrapped), hsm.ClassRequest)
			must(t, to.DropDomain("kek-1"))
			must(t, to.ImportDomain(kek, wrapped))
			must(t, to.ImportDomain(kek, wrapped))

			for _, a := range way.algorithms {
				spec := hsmtest.Spec("clone", hsm.PurposeCA)
				spec.Algorithm = a
				k, err := from.Generate(spec)
				must(t, err)
				b, err := from.Export(k.ID, "")
				must(t, err)
				for name, bad := range hsmtest.Tampered(b) {
					if _, err := to.Import(bad); hsm.ClassOf(err) != hsm.ClassRequest {
						t.Errorf("%s, %s: %v", a, name, err)
					}
				}
				for range 2 {
					clone, err := to.Import(b)
					must(t, err)
					if clone.Attributes != k.Attributes || clone.KeySpec != k.KeySpec || string(clone.SPKI) != string(k.SPKI) || clone.Local {
						t.Errorf("%s: clone %+v of %+v", a, clone, k)
					}
				}
				objects(t, to, k.ID, 2)
				hsmtest.SignAndVerify(t, hsmtest.Direct(to), k, 2)
				for _, kind := range []uint{p11.CKA_DECRYPT, p11.CKA_UNWRAP, p11.CKA_DERIVE, p11.CKA_SIGN_RECOVER} {
					if v, err := to.Attribute(k.ID, kind); err == nil && (len(v) != 1 || v[0] != 0) {
						t.Errorf("%s: the clone has use 0x%X", a, kind)
					}
				}

				// And back, where it was lost.
				back, err := to.Export(k.ID, "")
				must(t, err)
				must(t, from.Destroy(k.ID, k.SPKI))
				again, err := from.Import(back)
				must(t, err)
				if again.Attributes != k.Attributes {
					t.Errorf("%s: back as %+v", a, again)
				}
				hsmtest.SignAndVerify(t, hsmtest.Direct(from), k, 1)
			}
			must(t, from.Destroy(k.ID, k.SPKI))
			if a, b := from.Info().Digest, to.Info().Digest; a != b {
				t.Errorf("the same keys have digests %s and %s", a, b)
			}
		})
	}
}

func TestAModuleThatKeepsNothingInsideIsNoMember(t *testing.T) {
	cfg, _ := nss.fresh(t)
	cfg.Test = false
	_, err := pkcs11.Open(cfg)
	if err == nil || !strings.Contains(err.Error(), "not extractable") || !strings.Contains(err.Error(), "test: true") {
		t.Errorf("opened, or the error does not say why: %v", err)
	}
	cfg.Test = true
	token := open(t, cfg)
	if err := token.SelfTest(); err == nil {
		t.Error("passes its test")
	}
	// What the module would do, this process does not.
	spec := hsmtest.Spec("stays", hsm.PurposeCA)
	spec.NonExtractable = true
	k, err := token.Generate(spec)
	must(t, err)
	must(t, token.GenerateDomain("kek-1"))
	_, err = token.Export(k.ID, "")
	hsmtest.WantClass(t, err, hsm.ClassRequest)
}

func TestSelfTestTellsWrappingsApart(t *testing.T) {
	each(t, func(t *testing.T, m *kind) {
		cfg, _ := m.fresh(t)
		token := open(t, cfg)
		if err := token.SelfTest(); err != nil && m == softHSM {
			t.Error(err)
		}
		wrong := map[*kind][]uint{softHSM: {p11.CKM_AES_KEY_WRAP}, nss: {p11.CKM_AES_KEY_WRAP_PAD}}[m] // RFC 3394, and another padding
		token.UseProfile(func(p *pkcs11.Profile) { p.KeyWrapPad = wrong })
		if err := token.SelfTest(); err == nil || !strings.Contains(err.Error(), "RFC 5649") {
			t.Errorf("0x%X is taken for RFC 5649: %v", wrong, err)
		}
		token.UseProfile(func(p *pkcs11.Profile) { p.KeyWrapPad = []uint{0x80000001} })
		if err := token.SelfTest(); err == nil || !strings.Contains(err.Error(), "not offered") {
			t.Errorf("a mechanism that does not exist: %v", err)
		}
		if n, err := token.Leftovers(); n != 0 || err != nil {
			t.Errorf("%d objects are left, %v", n, err)
		}
	})
}

// A lost login is told from a key that may not sign, also by a module that has one code for both.
func TestALostLoginIsALostSession(t *testing.T) {
	each(t, func(t *testing.T, m *kind) {
		cfg, _ := m.fresh(t)
		token := open(t, cfg)
		used, err := token.Generate(hsmtest.Spec("used", hsm.PurposeCA))
		must(t, err)
		unused, err := token.Generate(hsmtest.Spec("unused", hsm.PurposeCA))
		must(t, err)
		hsmtest.SignAndVerify(t, hsmtest.Direct(token), used, 1)
		must(t, token.Logout())
		_, err = token.Sign(unused.ID, make([]byte, 32))
		hsmtest.WantClass(t, err, hsm.ClassSession, hsm.ClassDevice)
		if _, err = token.Sign(used.ID, make([]byte, 32)); err != nil || m != nss { // whose copies in memory outlive a login
			hsmtest.WantClass(t, err, hsm.ClassSession, hsm.ClassDevice)
		}
		_, err = token.Inventory()
		hsmtest.WantClass(t, err, hsm.ClassSession)
		_, err = token.Export(used.ID, "")
		hsmtest.WantClass(t, err, hsm.ClassSession)
		hsmtest.WantClass(t, token.GenerateDomain("kek-1"), hsm.ClassSession)
		hsmtest.WantClass(t, token.Destroy(used.ID, used.SPKI), hsm.ClassSession)
		if i := token.Info(); i.Keys != 2 {
			t.Errorf("keys out of sight are taken for gone: %+v", i)
		}
	})
}

func TestProfilesAreChosenByNameOrByTheModule(t *testing.T) {
	for manufacturer, want := range map[string]string{"SoftHSM": "softhsm", "Mozilla Foundation": "nss", "Acme": "generic", "": "generic"} {
		if p := pkcs11.ProfileOf(manufacturer); p.Name != want {
			t.Errorf("%q: %s", manufacturer, p.Name)
		}
	}
	each(t, func(t *testing.T, m *kind) {
		cfg, _ := m.fresh(t)
		token, err := pkcs11.Open(cfg)
		must(t, err)
		if token.Profile().Name != m.name {
			t.Errorf("profile %s", token.Profile().Name)
		}
		closed(t, token)
		cfg.Profile = m.name
		token, err = pkcs11.Open(cfg)
		must(t, err)
		closed(t, token)
		cfg.Profile = "acme"
		_, err = pkcs11.Open(cfg)
		hsmtest.WantClass(t, err, hsm.ClassRequest)
	})
	t.Run("a generic module", func(t *testing.T) {
		cfg, _ := fresh(t)
		cfg.Profile = "generic"
		hsmtest.Contract{Token: hsmtest.Direct(open(t, cfg)), Algorithms: []hsm.Algorithm{hsm.P256, hsm.P384}}.Run(t)
	})
	t.Run("a directory that cannot be told", func(t *testing.T) {
		cfg, _ := nss.fresh(t)
		for _, dir := range []string{"", "it's", `a\b`} {
			cfg.Dir, cfg.Profile = dir, "nss"
			_, err := pkcs11.Open(cfg)
			hsmtest.WantClass(t, err, hsm.ClassRequest)
		}
	})
}
