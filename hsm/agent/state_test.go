package agent_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"trivet/hsm"
	"trivet/hsm/agent"
	"trivet/hsm/hsmtest"
	"trivet/identity"
)

func TestDamagedStateIsRefusedAndSaysWhatToDo(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state.json")
	if _, err := agent.OpenState(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no state: %v", err)
	}
	if _, err := agent.CreateState(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := agent.CreateState(dir); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a second creation: %v", err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := agent.OpenState(dir); err != nil {
		t.Errorf("good: %v", err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	for name, bad := range map[string]string{
		"empty": "", "torn": string(good[:len(good)/2]), "other version": strings.Replace(string(good), `"version":1`, `"version":2`, 1),
		"edited": strings.Replace(string(good), `{"version":1`, `{"version":1,"epoch":7`, 1), "no sum": `{"state":{"version":1}}`, "null": "null",
	} {
		if err := os.WriteFile(path, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := agent.OpenState(dir); err == nil || !strings.Contains(err.Error(), "put back the newest copy") || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path+".new", []byte("half a st"), 0o600); err != nil { // left by a process that died
		t.Fatal(err)
	}
	if _, err := agent.OpenState(dir); err != nil {
		t.Error(err)
	}
}

// What cannot be remembered does not happen, and the process ends.
func TestNoStateNoAct(t *testing.T) {
	w := open(t)
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	state, err := agent.CreateState(dir)
	if err != nil {
		t.Fatal(err)
	}
	s := serve(t, w.token, func(c *agent.Config) { c.State = state })
	k := newKey(t, w, hsm.PurposeAudit)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	err = s.client(identity.RoleSync).Destroy(soon(t), hsm.DestroyRequest{Group: "demo", Key: k.ID, SPKI: k.SPKI,
		Grant: w.grant(t, "key-destroy", "demo/"+string(k.ID), map[string]string{"spki": sha(k.SPKI)})})
	hsmtest.WantClass(t, err, hsm.ClassDevice)
	<-s.fatal
	if _, err := w.token.Key(k.ID); err != nil {
		t.Errorf("it was destroyed: %v", err)
	}
}

func FuzzState(f *testing.F) {
	f.Add([]byte(`{"sum":"","state":{"version":1}}`))
	f.Add([]byte(`{"sum":"x","state":null}`))
	f.Fuzz(func(t *testing.T, content []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "state.json"), content, 0o600); err != nil {
			t.Fatal(err)
		}
		_, _ = agent.OpenState(dir) // must not panic
	})
}
