package db_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"trivet/db"
	"trivet/db/dbtest"
)

func macKeys(t testing.TB, secrets ...byte) *db.MACKeys {
	t.Helper()
	var text string
	for _, s := range secrets {
		text += strings.Repeat(fmt.Sprintf("%02x", s), 32) + "\n"
	}
	k, err := db.ParseMACKeys([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestAMACCoversWhatDecidesWhatIsSigned(t *testing.T) {
	k := macKeys(t, 1)
	sealed := intent("demo-g1", "ca1", "x")
	sealed.Reference = "CHG-1"
	k.Seal(&sealed)
	if err := k.Verify(&sealed); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*db.Intent){
		"issuer":          func(i *db.Intent) { i.Issuer = "demo-g2" },
		"serial":          func(i *db.Intent) { i.Serial[19]++ },
		"req":             func(i *db.Intent) { i.Req[0]++ },
		"no req":          func(i *db.Intent) { i.Req = nil },
		"ver":             func(i *db.Intent) { i.Ver = 2 },
		"body":            func(i *db.Intent) { i.Body[0]++ },
		"tbs":             func(i *db.Intent) { i.TBS[100]++ },
		"longer tbs":      func(i *db.Intent) { i.TBS = append(i.TBS, 0) },
		"profile":         func(i *db.Intent) { i.Profile = "other" },
		"profile version": func(i *db.Intent) { i.ProfileVersion++ },
		"profile hash":    func(i *db.Intent) { i.ProfileHash[0]++ },
		"requester":       func(i *db.Intent) { i.Requester += "x" },
		"reference":       func(i *db.Intent) { i.Reference = "" },
		"moved boundary":  func(i *db.Intent) { i.Requester += "C"; i.Reference = "HG-1" },
		"site epoch":      func(i *db.Intent) { i.SiteEpoch++ },
		"node":            func(i *db.Intent) { i.Node = "ca2" },
		"mac":             func(i *db.Intent) { i.MAC[31]++ },
	} {
		i := sealed
		for _, f := range []*[]byte{&i.Serial, &i.Req, &i.Body, &i.TBS, &i.ProfileHash, &i.MAC} {
			*f = slices.Clone(*f)
		}
		change(&i)
		if err := k.Verify(&i); !errors.Is(err, db.ErrForgedMAC) {
			t.Errorf("%s: %v", name, err)
		}
	}
	bare := sealed
	bare.MAC = nil
	if err := k.Verify(&bare); !errors.Is(err, db.ErrNoMAC) {
		t.Errorf("without a MAC: %v", err)
	}
}

func TestMACKeysAreRotated(t *testing.T) {
	old, both, swapped, fresh := macKeys(t, 1), macKeys(t, 1, 2), macKeys(t, 2, 1), macKeys(t, 2)
	a, b := intent("demo-g1", "ca1", "x"), intent("demo-g1", "ca1", "y")
	old.Seal(&a)
	swapped.Seal(&b)
	for name, c := range map[string]struct {
		k    *db.MACKeys
		row  *db.Intent
		want error
	}{
		"old row, both keys": {both, &a, nil}, "old row, swapped keys": {swapped, &a, nil}, "old row, new key alone": {fresh, &a, db.ErrForeignMAC},
		"new row, both keys": {both, &b, nil}, "new row, old key alone": {old, &b, db.ErrForeignMAC},
	} {
		if err := c.k.Verify(c.row); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAMACSurvivesTheDatabase(t *testing.T) {
	c := cluster.Need(t)
	s := dbtest.Open(t, c.New(t))
	k := macKeys(t, 1)
	in := intent("demo-g1", "ca1", "x")
	k.Seal(&in)
	if rows := insert(t, s, in); k.Verify(&rows[0]) != nil {
		t.Error("the row that was inserted does not verify")
	}
	again := intent("demo-g1", "ca2", "x") // somebody else's repeat reads it from the table
	if rows := insert(t, s, again); k.Verify(&rows[0]) != nil || rows[0].Node != "ca1" {
		t.Errorf("the row that was read does not verify: %+v", rows[0])
	}
	open, err := s.OpenIntents(soon(t), 0, 10)
	if err != nil || len(open) != 1 || k.Verify(&open[0]) != nil {
		t.Errorf("%d open intents, %v", len(open), err)
	}
}

func TestMACKeyFiles(t *testing.T) {
	file := filepath.Join(t.TempDir(), "keys")
	if err := os.WriteFile(file, db.NewMACKey(), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := db.LoadMACKeys(file); err != nil {
		t.Error(err)
	}
	if err := os.Chmod(file, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := db.LoadMACKeys(file); err == nil {
		t.Error("a file that others may read was taken")
	}
	secret := strings.Repeat("5ec7", 16)
	for _, text := range []string{"", "# none\n", "x" + secret, secret[2:], secret + " ", secret + "\n" + secret, strings.Repeat("z", 1<<17)} {
		_, err := db.ParseMACKeys([]byte(text))
		if ok := text == secret+" "; ok != (err == nil) {
			t.Errorf("%.20q…: %v", text, err)
		}
		if err != nil && strings.Contains(err.Error(), "5ec75ec7") {
			t.Errorf("the error shows the key: %v", err)
		}
	}
}

// Whatever a file says, reading it ends, and what was read seals.
func FuzzMACKeys(f *testing.F) {
	f.Add(db.NewMACKey())
	f.Fuzz(func(t *testing.T, text []byte) {
		if k, err := db.ParseMACKeys(text); err == nil {
			i := intent("demo-g1", "ca1", "x")
			k.Seal(&i)
			if err := k.Verify(&i); err != nil {
				t.Fatal(err)
			}
		}
	})
}
