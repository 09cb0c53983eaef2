package cluster

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// The supervisor is told what to do over HTTP on a unix socket in the cluster's directory; who may open the socket may command.

// event is one line of the start-up's story. The last one has Done set, and Err when the start failed.
type event struct {
	Text string `json:"text,omitempty"`
	Done bool   `json:"done,omitempty"`
	Err  string `json:"err,omitempty"`
}

// story keeps the events of the start-up for everybody who asks, also later.
type story struct {
	mu      sync.Mutex
	events  []event
	changed chan struct{}
}

func newStory() *story { return &story{changed: make(chan struct{})} }

func (s *story) tell(e event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = append(s.events, e)
	close(s.changed)
	s.changed = make(chan struct{})
}

// follow calls fn with every event, past and coming, up to the last.
func (s *story) follow(ctx context.Context, fn func(event) error) error {
	for next := 0; ; {
		s.mu.Lock()
		news, changed := s.events[next:], s.changed
		s.mu.Unlock()
		for _, e := range news {
			if err := fn(e); err != nil || e.Done {
				return err
			}
		}
		next += len(news)
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// handler is the supervisor's control interface.
func (s *supervisor) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(s.status())
	})
	mux.HandleFunc("GET /story", func(w http.ResponseWriter, r *http.Request) {
		enc := json.NewEncoder(w)
		_ = s.story.follow(r.Context(), func(e event) error {
			err := enc.Encode(e)
			w.(http.Flusher).Flush()
			return err
		})
	})
	mux.HandleFunc("POST /parts/{name}/{verb}", func(w http.ResponseWriter, r *http.Request) {
		sig, _ := strconv.Atoi(r.URL.Query().Get("signal"))
		if err := s.act(r.Context(), r.PathValue("name"), r.PathValue("verb"), syscall.Signal(sig)); err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
		}
	})
	mux.HandleFunc("POST /members/{name}/{verb}", func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		a := Added{Name: r.PathValue("name"), Module: q.Get("module"), Env: q["env"]}
		if err := s.change(r.Context(), a, r.PathValue("verb")); err != nil {
			http.Error(w, err.Error(), http.StatusConflict)
		}
	})
	s.handleDatabase(mux)
	mux.HandleFunc("POST /down", func(w http.ResponseWriter, r *http.Request) {
		s.end(r.URL.Query().Get("how") == "clean")
	})
	return mux
}

// controlAddress names the socket by way of the directory's descriptor: the name of a unix socket may not exceed 107 bytes, that of a
// directory may. The file must be kept open while the address is used.
func controlAddress(l Layout) (string, *os.File, error) {
	dir, err := os.Open(l.run())
	if err != nil {
		return "", nil, err
	}
	return fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(l.socket())), dir, nil
}

func listenControl(l Layout) (net.Listener, error) {
	if err := os.Remove(l.socket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("removing an old control socket: %w", err)
	}
	addr, dir, err := controlAddress(l)
	if err != nil {
		return nil, fmt.Errorf("opening the control socket: %w", err)
	}
	defer dir.Close()
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	ln, err := net.Listen("unix", addr)
	if err != nil {
		return nil, fmt.Errorf("opening the control socket: %w", err)
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false) // its name was a descriptor's
	return ln, nil
}

// errNoSupervisor means that nobody answers on the control socket.
var errNoSupervisor = errors.New("the cluster is not running: start it with `pkictl demo up`")

// control is the client of a supervisor.
type control struct {
	layout Layout
	http   *http.Client
}

func newControl(l Layout) *control {
	return &control{layout: l, http: &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			addr, dir, err := controlAddress(l)
			var c net.Conn
			if err == nil {
				defer dir.Close()
				c, err = (&net.Dialer{}).DialContext(ctx, "unix", addr)
			}
			if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, os.ErrNotExist) {
				return nil, errNoSupervisor
			}
			return c, err
		},
	}}}
}

// call makes one request and decodes a JSON answer into out, if there is one.
func (c *control) call(ctx context.Context, method, path string, query url.Values, out any) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	body, err := c.open(ctx, method, path, query)
	if err != nil {
		return err
	}
	defer body.Close()
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(body).Decode(out); err != nil {
		return fmt.Errorf("reading the supervisor's answer: %w", err)
	}
	return nil
}

func (c *control) open(ctx context.Context, method, path string, query url.Values) (io.ReadCloser, error) {
	u := url.URL{Scheme: "http", Host: "supervisor", Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), http.NoBody)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if errors.Is(err, errNoSupervisor) {
			return nil, errNoSupervisor
		}
		if errors.Is(err, os.ErrPermission) {
			return nil, fmt.Errorf("the cluster in %s is another user's: %w", c.layout.Dir, os.ErrPermission)
		}
		return nil, fmt.Errorf("asking the supervisor: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
		return nil, errors.New(strings.TrimSpace(string(text)))
	}
	return resp.Body, nil
}

// follow writes the story of the start-up to progress until it ends, and returns its error.
func (c *control) follow(ctx context.Context, progress func(string)) error {
	body, err := c.open(ctx, http.MethodGet, "/story", nil)
	if err != nil {
		return err
	}
	defer body.Close()
	lines := bufio.NewScanner(body)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(bytes.TrimSpace(lines.Bytes()), &e); err != nil {
			return fmt.Errorf("reading the supervisor's answer: %w", err)
		}
		if e.Text != "" {
			progress(e.Text)
		}
		if e.Done {
			if e.Err != "" {
				return errors.New(e.Err)
			}
			return nil
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fmt.Errorf("the supervisor ended while it started the cluster: see %s", c.layout.Log("supervisor"))
}
