package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"trivet/identity"
)

// court is a cluster's people and one request, written to a file.
type court struct {
	t         *testing.T
	dir, file string
	authority *identity.Authority
	request   identity.Request
}

func newCourt(t *testing.T) *court {
	t.Helper()
	dir := t.TempDir()
	authority, err := identity.CreateAuthority(filepath.Join(dir, "infra"), "test")
	if err != nil {
		t.Fatal(err)
	}
	c := &court{t: t, dir: dir, file: filepath.Join(dir, "request.json"), authority: authority}
	c.request = identity.NewRequest(identity.Principal{Cluster: "test", Role: identity.RoleSync, Name: "sync1"}, "hsm-enroll", "main/hsmd-d",
		map[string]string{"transport": "5f3a", "note\x1b[2J": "a  b", "standby": ""}, time.Now(), time.Hour)
	if err := writeRequest(c.file, identity.Grant{Request: c.request}); err != nil {
		t.Fatal(err)
	}
	return c
}

// flags say who calls.
func (c *court) flags(role identity.Role, name string) []string {
	c.t.Helper()
	f, err := c.authority.IssueTo(filepath.Join(c.dir, string(role)+"-"+name), identity.Principal{Cluster: "test", Role: role, Name: name}, nil, nil, time.Hour)
	if err != nil {
		c.t.Fatal(err)
	}
	return []string{"--cert", f.Cert, "--key", f.Key, "--trust", f.Trust}
}

func (c *court) approve(role identity.Role, name string, more ...string) result {
	c.t.Helper()
	return pkictl(c.t, append(append([]string{"approve", c.file}, c.flags(role, name)...), more...)...)
}

func (c *court) read() string {
	c.t.Helper()
	text, err := os.ReadFile(c.file)
	if err != nil {
		c.t.Fatal(err)
	}
	return string(text)
}

func TestApproveShowsEverythingAndAddsOneApproval(t *testing.T) {
	c := newCourt(t)
	r := c.approve("admin", "alice", "--yes")
	if r.code != exitOK || r.out != "hsm-enroll of main/hsmd-d is approved by trivet://test/admin/alice\n" {
		t.Fatalf("exit %d, %q\n%s", r.code, r.out, r.err)
	}
	for _, want := range []string{
		"trivet://test/admin/alice is asked to approve", "action", "hsm-enroll", "object", "main/hsmd-d", "detail transport", "5f3a",
		`detail "note\x1b[2J"`, `"a  b"`, `detail standby`, `""`, "proposed by", "trivet://test/sync/sync1", "expires", "(in 1 h 00 min)", fmt.Sprintf("%x", c.request.Digest()),
	} {
		if !strings.Contains(r.err, want) {
			t.Errorf("%q is missing from:\n%s", want, r.err)
		}
	}
	if strings.Contains(r.err, "\x1b") {
		t.Error("the request moved the cursor")
	}

	r = c.approve("ca-operator", "bob", "--yes", "--output", "json")
	var got approved
	if err := json.Unmarshal([]byte(r.out), &got); err != nil || r.code != exitOK {
		t.Fatal(r, err)
	}
	if got.As != "trivet://test/ca-operator/bob" || len(got.By) != 2 || got.Request != fmt.Sprintf("%x", c.request.Digest()) || got.File != c.file {
		t.Errorf("%+v", got)
	}
	g, err := readGrants([]string{c.file})
	if err != nil {
		t.Fatal(err)
	}
	f, err := c.authority.IssueTo(filepath.Join(c.dir, "hsmd"), identity.Principal{Cluster: "test", Role: identity.RoleHSMD, Name: "hsmd-a"}, nil, nil, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	hsmd, err := identity.Load(f)
	if err != nil {
		t.Fatal(err)
	}
	if by, err := hsmd.Approved(g.Request, g.Approvals, 2, time.Now(), approvers...); err != nil || len(by) != 2 {
		t.Error(by, err)
	}

	before := c.read()
	if r := c.approve("admin", "alice", "--yes"); r.code != exitOK || !strings.Contains(r.err, "already") || c.read() != before {
		t.Errorf("again: exit %d, %s", r.code, r.err)
	}
}

func TestApproveRefusesAndLeavesTheFileAlone(t *testing.T) {
	for name, c := range map[string]struct {
		role   identity.Role
		who    string
		change func(c *court, g *identity.Grant)
		want   string
	}{
		"a role that approves nothing": {"auditor", "ann", nil, "approves nothing"},
		"a machine":                    {"hsmd", "hsmd-a", nil, "approves nothing"},
		"the proposer": {"admin", "alice", func(c *court, g *identity.Grant) {
			g.Request.Proposer = "trivet://test/admin/alice"
		}, "proposed it"},
		"one who did it in another role": {"admin", "alice", func(c *court, g *identity.Grant) { c.add(g, "ca-operator", "alice") }, "has approved it already"},
		"beside an approval that does not count": {"admin", "alice", func(c *court, g *identity.Grant) {
			c.add(g, "admin", "bob")
			g.Request.Object = "main/hsmd-e"
		}, "the signature is not over this request"},
		"an expired request": {"admin", "alice", func(c *court, g *identity.Grant) {
			g.Request.Created, g.Request.Expires = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
		}, "expired"},
		"another cluster's": {"admin", "alice", func(c *court, g *identity.Grant) { g.Request.Cluster = "other" }, "cluster"},
	} {
		court := newCourt(t)
		g := identity.Grant{Request: court.request, Approvals: []identity.Approval{}}
		if c.change != nil {
			c.change(court, &g)
			text, err := json.Marshal(g)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(court.file, text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		before := court.read()
		r := court.approve(c.role, c.who, "--yes")
		if r.code != exitFailed || !strings.Contains(r.err, c.want) || r.out != "" || court.read() != before {
			t.Errorf("%s: exit %d, %q, %s; want %q", name, r.code, r.out, r.err, c.want)
		}
	}
	court := newCourt(t)
	if err := os.WriteFile(court.file, []byte(`{"request":{},"votes":[]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := court.approve("admin", "alice", "--yes"); r.code != exitFailed || !strings.Contains(r.err, "votes") {
		t.Errorf("an unknown field: exit %d, %s", r.code, r.err)
	}
}

// add has somebody approve g.
func (c *court) add(g *identity.Grant, role identity.Role, name string) {
	c.t.Helper()
	f := c.flags(role, name)
	id, err := identity.Load(identity.Files{Cert: f[1], Key: f[3], Trust: f[5]})
	if err != nil {
		c.t.Fatal(err)
	}
	a, err := id.Approve(g.Request, time.Now())
	if err != nil {
		c.t.Fatal(err)
	}
	g.Approvals = append(g.Approvals, a)
}

func TestApproveAsksOnATerminal(t *testing.T) {
	for answer, want := range map[string]int{"yes\n": exitOK, " yes \n": exitOK, "y\n": exitFailed, "\n": exitFailed, "yes!\n": exitFailed, "\x04": exitFailed} {
		c := newCourt(t)
		before := c.read()
		keyboard, screen := terminal(t)
		if _, err := keyboard.WriteString(answer); err != nil {
			t.Fatal(err)
		}
		var out, errw bytes.Buffer
		code := run(t.Context(), append([]string{"approve", c.file}, c.flags("admin", "alice")...), screen, &out, &errw)
		if code != want || !strings.Contains(errw.String(), "Type yes") || (c.read() != before) != (want == exitOK) {
			t.Errorf("%q: exit %d, %s", answer, code, errw.String())
		}
	}
	c := newCourt(t)
	if r := c.approve("admin", "alice"); r.code != exitUsage || !strings.Contains(r.err, "--yes") {
		t.Errorf("without a terminal: exit %d, %s", r.code, r.err)
	}
	_, screen := terminal(t)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	var out, errw bytes.Buffer
	if code := run(ctx, append([]string{"approve", c.file}, c.flags("admin", "alice")...), screen, &out, &errw); code != exitFailed || !strings.Contains(errw.String(), "interrupted") {
		t.Errorf("interrupted: exit %d, %s", code, errw.String())
	}
}

// terminal is a pseudo-terminal.
func terminal(t *testing.T) (keyboard, screen *os.File) {
	t.Helper()
	keyboard, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skip("there are no pseudo-terminals: ", err)
	}
	t.Cleanup(func() { keyboard.Close() })
	fd := int(keyboard.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if screen, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { screen.Close() })
	return keyboard, screen
}

func TestPeopleWhoApproveAtOnceAreAllInTheFile(t *testing.T) {
	c := newCourt(t)
	var wg sync.WaitGroup
	for n := range identity.MaxApprovals {
		args := append([]string{"approve", c.file, "--yes"}, c.flags("admin", fmt.Sprintf("p%d", n))...)
		wg.Go(func() {
			var out, errw bytes.Buffer
			if code := run(t.Context(), args, strings.NewReader(""), &out, &errw); code != exitOK {
				t.Errorf("exit %d: %s", code, errw.String())
			}
		})
	}
	wg.Wait()
	g, err := readGrants([]string{c.file})
	if err != nil || len(g.Approvals) != identity.MaxApprovals {
		t.Errorf("%d approvals, %v", len(g.Approvals), err)
	}
	if r := c.approve("admin", "late", "--yes"); r.code != exitFailed || !strings.Contains(r.err, "at most 8") {
		t.Errorf("one too many: exit %d, %s", r.code, r.err)
	}
}

func TestApproveWithoutANameIsAWrongCommandLine(t *testing.T) {
	c := newCourt(t)
	for _, args := range [][]string{{}, {c.file}, {c.file, "--as", "mallory"}, {c.file, "--cert", "x"}, {c.file, c.file, "--as", "admin1"}} {
		if r := pkictl(t, append([]string{"approve"}, args...)...); r.code != exitUsage || r.out != "" {
			t.Errorf("%v: exit %d, %s", args, r.code, r.err)
		}
	}
	if r := pkictl(t, "approve", c.file, "--as", "admin1"); r.code != exitFailed || !strings.Contains(r.err, "pkictl demo up") {
		t.Errorf("without a demo: exit %d, %s", r.code, r.err)
	}
}
