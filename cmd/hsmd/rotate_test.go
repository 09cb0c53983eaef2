package main_test

import (
	"crypto/sha256"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"trivet/hsm"
	"trivet/hsm/hsmtest"
	"trivet/identity"
)

const time30 = 30 * time.Second

// rotation is a request of group demo to rotate m's PIN, approved.
func rotation(t *testing.T, lab *hsmtest.Lab, m *hsmtest.Member, change func(*hsm.PINRequest)) hsm.PINRequest {
	t.Helper()
	req := hsm.PINRequest{Group: "demo", Members: []string{m.Name}}
	if change != nil {
		change(&req)
	}
	req.Grant = approved(t, lab, "hsm-pin-rotate", "demo", req.Detail())
	return req
}

func pinOf(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func gone(t *testing.T, path string) {
	t.Helper()
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("%s is there: %v", path, err)
	}
}

// secret fails if one of the PINs is anywhere but in its file.
func secret(t *testing.T, m *hsmtest.Member, pins ...string) {
	t.Helper()
	state, err := os.ReadFile(filepath.Join(m.Dir, "state.json"))
	if err != nil {
		t.Fatal(err)
	}
	audit, err := json.Marshal(record(t, m))
	if err != nil {
		t.Fatal(err)
	}
	for where, text := range map[string]string{"log": m.Log(), "state": string(state), "audit record": string(audit)} {
		for _, pin := range pins {
			if strings.Contains(text, pin) {
				t.Errorf("a PIN is in the %s", where)
			}
		}
	}
}

// outcomes are those of a member's rotations, in order.
func outcomes(t *testing.T, m *hsmtest.Member) (all []string) {
	t.Helper()
	for _, a := range record(t, m) {
		if a.Event == "rotate-pin" {
			all = append(all, a.Outcome)
		}
	}
	return all
}

// A PIN that nobody has seen takes the old one's place; the same approval does it once.
func TestThePINIsRotated(t *testing.T) {
	for name, member := range map[string]func(*hsmtest.Lab) (*hsmtest.Member, hsmtest.Faults){
		"SoftHSM": func(l *hsmtest.Lab) (*hsmtest.Member, hsmtest.Faults) { return l.Faulty("hsmd-a") },
		"NSS":     func(l *hsmtest.Lab) (*hsmtest.Member, hsmtest.Faults) { return l.FaultyNSS("hsmd-a") },
	} {
		t.Run(name, func(t *testing.T) {
			lab := hsmtest.NewLab(t)
			m, faults := member(lab)
			m.Serve()
			k, before := newKey(t, m), pinOf(t, m.PIN)
			req := rotation(t, lab, m, nil)
			faults.Clear("logins")
			if err := m.Client(identity.RoleSync).RotatePIN(within(t, time30), req); err != nil {
				t.Fatal(err)
			}
			if code := m.Exit(); code != 1 {
				t.Errorf("exit code %d", code)
			}
			m.Start()
			info := m.WaitReady()
			after := pinOf(t, m.PIN)
			if info.PIN.Rotated.IsZero() || info.PIN.Undone != "" || info.PIN.Unfinished != "" || info.PIN.Warning != "" {
				t.Errorf("%+v", info.PIN)
			}
			if after == before || len(after) != 32 {
				t.Errorf("the new PIN has %d octets", len(after))
			}
			if st, err := os.Stat(m.PIN); err != nil || st.Mode().Perm() != 0o600 {
				t.Errorf("PIN file: %v, %v", st, err)
			}
			gone(t, m.PIN+".new")
			if n := strings.Count(faults.Read("logins"), "user 1"); n != 1 {
				t.Errorf("%d logins", n)
			}
			hsmtest.SignAndVerify(t, m.Client(identity.RoleCA), k, 3)
			if err := m.Client(identity.RoleSync).RotatePIN(within(t, time30), req); err != nil { // done before
				t.Error(err)
			}
			if again := m.Restart(); again.PIN != info.PIN || pinOf(t, m.PIN) != after {
				t.Errorf("it was rotated twice: %+v", again.PIN)
			}
			if got := strings.Join(outcomes(t, m), " "); got != "begun ok ok" {
				t.Errorf("audit record: %s", got)
			}
			secret(t, m, before, after)
		})
	}
}

// Whatever becomes of C_SetPIN, and of the process that finds out, the agent starts by itself with the PIN that the token has,
// and says which. A wrong PIN is tried at most once in between.
func TestAnAgentThatDiesInARotationFindsThePIN(t *testing.T) {
	const done, undone = true, false
	for name, c := range map[string]struct {
		ask  string // what becomes of C_SetPIN
		find string // and of the logins of the next process
		want bool
	}{
		"dies before":                                {"crash", "", undone},
		"dies after":                                 {"after crash", "", done},
		"fails - not done":                           {"fail 0x30", "", undone},
		"fails but done":                             {"after fail 0x30", "", done},
		"refused":                                    {"fail 0xA2", "", undone},
		"said to be refused but done":                {"after fail 0xA0", "", done},
		"session lost but done":                      {"after fail 0xB3", "", done},
		"hangs - not done":                           {"hang", "", undone},
		"hangs but done":                             {"after hang", "", done},
		"done - dies before the login":               {"delay 1", "crash nth 1", done},
		"done - dies after the login":                {"delay 1", "after crash nth 1", done},
		"done - login reported failed":               {"delay 1", "after fail 0x30 nth 1", done},
		"done - login fails":                         {"delay 1", "fail 0x30 nth 1", done},
		"not done - dies before the first login":     {"crash", "crash nth 1", undone},
		"not done - dies after the first login":      {"crash", "after crash nth 1", undone},
		"not done - dies before the second login":    {"crash", "crash nth 2", undone},
		"not done - dies after the second login":     {"crash", "after crash nth 2", undone},
		"not done - second login reported failed":    {"crash", "after fail 0x30 nth 2", undone},
		"done - dies again and again":                {"after crash", "after crash first 3", done},
		"not done - dies again and again":            {"crash", "after crash first 3", undone},
		"not done - dies before logins - repeatedly": {"crash", "crash first 3", undone},
	} {
		t.Run(name, func(t *testing.T) {
			lab := hsmtest.NewLab(t)
			m, faults := lab.Faulty("hsmd-a", "call_timeout: 300ms")
			m.Serve()
			k, before := newKey(t, m), pinOf(t, m.PIN)
			req := rotation(t, lab, m, nil)
			faults.Set("C_SetPIN", c.ask)
			err := m.Client(identity.RoleSync).RotatePIN(within(t, time30), req)
			if clean := c.ask == "delay 1"; (err == nil) != clean {
				t.Errorf("answer: %v", err)
			}
			m.Exit()
			faults.Clear("C_SetPIN")
			made := pinOf(t, m.PIN+".new")
			if c.find != "" {
				faults.Set("C_Login", c.find)
			}
			var info hsm.Info
			for try := 0; ; try++ {
				m.Start()
				if up(t, m) {
					break
				}
				if try == 6 {
					t.Fatal("the agent does not come back by itself")
				}
			}
			faults.Clear("C_Login")
			info = m.WaitReady()
			want := map[bool]string{done: made, undone: before}[c.want]
			if got := pinOf(t, m.PIN); got != want {
				t.Errorf("the PIN file has the old PIN: %t, want %t", got == before, want == before)
			}
			if rotated := !info.PIN.Rotated.IsZero(); rotated != c.want || (info.PIN.Undone == "") != c.want || info.PIN.Unfinished != "" || info.PIN.Warning != "" {
				t.Errorf("%+v", info.PIN)
			}
			gone(t, m.PIN+".new")
			gone(t, filepath.Join(m.Dir, "pin-refused.json"))
			all := outcomes(t, m)
			if last := all[len(all)-1]; last != map[bool]string{done: "ok", undone: "undone"}[c.want] {
				t.Errorf("audit record: %q", all)
			}
			secret(t, m, before, made)
			m.Restart()
			hsmtest.SignAndVerify(t, m.Client(identity.RoleCA), k, 1)
			if c.want == undone { // the approval is still good
				if err := m.Client(identity.RoleSync).RotatePIN(within(t, time30), req); err != nil {
					t.Fatal(err)
				}
				m.Exit()
				m.Start()
				if info := m.WaitReady(); info.PIN.Rotated.IsZero() || pinOf(t, m.PIN) == before {
					t.Errorf("again: %+v", info.PIN)
				}
			}
		})
	}
}

// up waits until the member signs, or has ended.
func up(t *testing.T, m *hsmtest.Member) bool {
	t.Helper()
	c := m.Client(identity.RoleSync)
	for ; ; time.Sleep(10 * time.Millisecond) {
		info, err := c.Health(within(t, time30))
		if err == nil && info.Probe.OK {
			return true
		}
		if m.Ended() {
			return false
		}
	}
}

// Each point between the steps on disk, as a crash leaves it, with each PIN that the token can have there. The number of logins is
// what the token was asked: no PIN but those two, none twice.
func TestARotationIsSettledFromEveryPoint(t *testing.T) {
	const first, second, third = "pin-of-hsmd-a", "the-second-pin-1", "somebody-elses-1"
	for name, c := range map[string]struct {
		note   map[string]any
		next   string // in the new PIN's file; empty: there is none
		file   string // in the PIN file
		token  string // the token's
		want   string // in the PIN file afterwards; empty: the agent does not start
		left   bool   // the new PIN's file is still there
		logins int
	}{
		"noted":                              {note: map[string]any{"phase": "begun"}, file: first, token: first, want: first, logins: 1},
		"drawn":                              {note: map[string]any{"phase": "begun"}, next: second, file: first, token: first, want: first, logins: 1},
		"prepared":                           {note: map[string]any{"phase": "begun", "prepared": true}, next: second, file: first, token: first, want: first, left: true, logins: 1},
		"asked - not done":                   {note: map[string]any{"phase": "asked"}, next: second, file: first, token: first, want: first, logins: 2},
		"asked - not done - prepared":        {note: map[string]any{"phase": "asked", "prepared": true}, next: second, file: first, token: first, want: first, left: true, logins: 2},
		"asked - done":                       {note: map[string]any{"phase": "asked"}, next: second, file: first, token: second, want: second, logins: 1},
		"the new one was being tried - done": {note: map[string]any{"phase": "asked", "tried": "new"}, next: second, file: first, token: second, want: second, logins: 2},
		"the new one was being tried":        {note: map[string]any{"phase": "asked", "tried": "new"}, next: second, file: first, token: first, want: first, logins: 1},
		"the old one was being tried - done": {note: map[string]any{"phase": "asked", "tried": "old"}, next: second, file: first, token: second, want: second, logins: 1},
		"taken":                              {note: map[string]any{"phase": "taken"}, next: second, file: first, token: second, want: second, logins: 1},
		"taken - the file in place":          {note: map[string]any{"phase": "taken"}, file: second, token: second, want: second, logins: 1},
		"refused":                            {note: map[string]any{"phase": "refused"}, next: second, file: first, token: first, want: first, logins: 1},
		"refused - the file gone":            {note: map[string]any{"phase": "refused"}, file: first, token: first, want: first, logins: 1},
		"another PIN than either":            {note: map[string]any{"phase": "asked"}, next: second, file: first, token: third, logins: 2},
		"the new one's file taken away":      {note: map[string]any{"phase": "asked"}, file: first, token: first, want: first, logins: 1},
		"a phase that this version lacks":    {note: map[string]any{"phase": "asleep"}, file: first, token: first, logins: 0},
	} {
		t.Run(name, func(t *testing.T) {
			m, faults := hsmtest.NewLab(t).Faulty("hsmd-a")
			m.Serve()
			k := newKey(t, m)
			m.Kill()
			if c.token != first {
				m.ChangePIN(c.token)
			}
			hsmtest.Write(t, m.PIN, c.file+"\n")
			if c.next != "" {
				hsmtest.Write(t, m.PIN+".new", c.next+"\n")
			}
			c.note["began"], c.note["approval"], c.note["request"] = "2026-01-01T00:00:00Z", "approved", "abc"
			note(t, m, c.note)
			faults.Clear("logins")
			m.Start()
			if c.want == "" {
				code := m.Exit()
				m.Start() // tries nothing again
				if again := m.Exit(); again != code || c.logins > 0 && code != 78 {
					t.Errorf("exit codes %d, %d", code, again)
				}
			} else {
				m.WaitReady()
				if got := pinOf(t, m.PIN); got != c.want {
					t.Errorf("the PIN file has the old PIN: %t", got == first)
				}
				hsmtest.SignAndVerify(t, m.Client(identity.RoleCA), k, 1)
				if _, err := os.Stat(m.PIN + ".new"); (err == nil) != c.left {
					t.Errorf("the new PIN's file: %v", err)
				}
			}
			if n := strings.Count(faults.Read("logins"), "user 1"); n != c.logins {
				t.Errorf("%d logins, want %d", n, c.logins)
			}
			secret(t, m, first, second, third)
		})
	}
}

// note enters a rotation into a member's state as a crash would have left it.
func note(t *testing.T, m *hsmtest.Member, rotation map[string]any) {
	t.Helper()
	path := filepath.Join(m.Dir, "state.json")
	var file struct {
		Sum   string         `json:"sum"`
		State map[string]any `json:"state"`
	}
	b, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(b, &file)
	}
	if err != nil {
		t.Fatal(err)
	}
	file.State["rotation"] = rotation
	state, err := json.Marshal(file.State)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(state)
	hsmtest.Write(t, path, `{"sum":"`+hex(sum[:])+`","state":`+string(state)+"}\n")
}

// What would fail is refused before anything is noted, with what to do instead; the agent lives on, and the approval stays good.
func TestARotationThatCannotBeIsRefused(t *testing.T) {
	lab := hsmtest.NewLab(t)
	m, faults := lab.Faulty("hsmd-a")
	m.Serve()
	before := m.WaitReady().Incarnation
	right := pinOf(t, m.PIN)
	faults.Set("C_SetPIN", "fail 0x30")
	c := m.Client(identity.RoleSync)
	random, prepared := rotation(t, lab, m, nil), rotation(t, lab, m, func(r *hsm.PINRequest) { r.Prepared = true })
	refused := func(class hsm.Class, want string, req hsm.PINRequest) {
		t.Helper()
		err := c.RotatePIN(within(t, time30), req)
		if hsm.ClassOf(err) != class || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), right) {
			t.Errorf("%v: want %q", err, want)
		}
	}
	bare := random
	bare.Grant = nil
	refused(hsm.ClassDenied, "approved by 2 people", bare)
	other := prepared
	other.Grant = random.Grant
	refused(hsm.ClassDenied, `pin="random"`, other)
	other = random
	other.Members = append(other.Members, "hsmd-b")
	refused(hsm.ClassDenied, `members="hsmd-a"`, other)
	other.Members = []string{"hsmd-b"}
	refused(hsm.ClassRequest, "not among those named", other)
	refused(hsm.ClassRequest, "no prepared PIN", prepared)
	for _, bad := range []struct{ pin, want string }{{right, "already"}, {"abc", "length"}, {"", "one non-empty line"}} {
		hsmtest.Write(t, m.PIN+".new", bad.pin)
		refused(hsm.ClassRequest, bad.want, prepared)
	}
	hsmtest.Write(t, m.PIN+".new", "something-else")
	if err := os.Chmod(m.PIN+".new", 0o644); err != nil {
		t.Fatal(err)
	}
	refused(hsm.ClassRequest, "chmod", prepared)
	refused(hsm.ClassRequest, "--prepared", random)
	if err := os.Remove(m.PIN + ".new"); err != nil {
		t.Fatal(err)
	}
	hsmtest.Write(t, m.PIN, "changed-since")
	refused(hsm.ClassRequest, "any more", random)
	hsmtest.Write(t, m.PIN, right)
	if err := os.Rename(m.PIN, m.PIN+"-real"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(m.PIN+"-real", m.PIN); err != nil {
		t.Fatal(err)
	}
	refused(hsm.ClassRequest, "link", random)
	if err := os.Rename(m.PIN+"-real", m.PIN); err != nil {
		t.Fatal(err)
	}
	hsmtest.WantClass(t, m.Client(identity.RoleCA).RotatePIN(within(t, time30), random), hsm.ClassDenied)
	if info := m.WaitReady(); info.Incarnation != before || info.PIN != (hsm.PIN{}) || faults.Calls("C_SetPIN") != 0 {
		t.Errorf("%+v, C_SetPIN was called %d times", info, faults.Calls("C_SetPIN"))
	}
	faults.Clear("C_SetPIN")
	hsmtest.Write(t, m.PIN+".new", "what-people-chose")
	if err := c.RotatePIN(within(t, time30), prepared); err != nil { // none of the refusals has used it
		t.Fatal(err)
	}
	m.Exit()
	m.Start()
	if m.WaitReady(); pinOf(t, m.PIN) != "what-people-chose" {
		t.Error("the prepared PIN is not the PIN")
	}
	gone(t, m.PIN+".new")
}

// Where a person gives the PIN, no file has it and the agent says what to do instead.
func TestAManuallyActivatedTokensPINIsNotRotated(t *testing.T) {
	lab := hsmtest.NewLab(t)
	m := lab.Member("hsmd-a", "activation: manual")
	if out, err := m.InitToken(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	m.Start()
	waitLocked(t, m)
	if err := m.Client(identity.RoleCAOperator).Activate(within(t, time30), pinOf(t, m.PIN)); err != nil {
		t.Fatal(err)
	}
	m.WaitReady()
	err := m.Client(identity.RoleSync).RotatePIN(within(t, time30), rotation(t, lab, m, nil))
	if hsm.ClassOf(err) != hsm.ClassRequest || !strings.Contains(err.Error(), "vendor's tool") {
		t.Error(err)
	}
	if m.Ended() {
		t.Error("the agent has ended")
	}
}
