// Package health is the report every process gives about itself: what it can do now, and why not.
package health

import (
	"encoding/json"
	"fmt"
	"net/http"
	"sort"
	"strings"
	"time"
)

// States of a process.
const (
	OK       = "ok"       // every capability it should have is there
	Degraded = "degraded" // something is missing; Capabilities and Checks say what
	Draining = "draining" // finishing what it began: send it nothing new
)

// Report is what a process says about itself at Time. It is made from cached checks, so asking costs nothing.
type Report struct {
	Node         string                `json:"node"`
	Role         string                `json:"role"`
	Incarnation  string                `json:"incarnation"` // changes with every start
	Version      string                `json:"version"`
	Time         time.Time             `json:"time"`
	State        string                `json:"state"`        // OK, Degraded, Draining
	Capabilities map[string]Capability `json:"capabilities"` // such as "issue:demo", "read", "ocsp:demo-g1"
	Checks       []Check               `json:"checks,omitempty"`
}

// Capability is one thing the process can do, or the reason why it cannot.
type Capability struct {
	OK    bool   `json:"ok"`
	Cause string `json:"cause,omitempty"`
}

// Check is one cached self-check behind the capabilities.
type Check struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail,omitempty"`
	AgeMS  int64  `json:"age_ms"` // since it was last made
}

// Can tells whether the process can do c now. A trailing * stands for any: "issue:*". A draining process can do nothing new.
func (r Report) Can(c string) bool {
	if r.State == Draining {
		return false
	}
	if prefix, any := strings.CutSuffix(c, "*"); any {
		for name, cap := range r.Capabilities {
			if cap.OK && strings.HasPrefix(name, prefix) {
				return true
			}
		}
		return false
	}
	return r.Capabilities[c].OK
}

// Ready tells whether the process is not draining and has at least one capability, if it has any to offer.
func (r Report) Ready() bool {
	if r.State == Draining {
		return false
	}
	for _, c := range r.Capabilities {
		if c.OK {
			return true
		}
	}
	return len(r.Capabilities) == 0 && r.State != Degraded
}

// Handler serves /livez (the process answers), /readyz (200 or 503; ?verbose lists checks and capabilities) and /healthz (the Report
// as JSON, always 200). report is called once per request, from many goroutines, and must not block.
func Handler(report func() Report) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		plain(w, http.StatusOK, "ok\n")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		rep := report()
		status, text := http.StatusOK, "ok\n"
		if !rep.Ready() {
			status, text = http.StatusServiceUnavailable, "not ready: "+rep.State+"\n"
		}
		if r.URL.Query().Has("verbose") {
			text = verbose(rep) + text
		}
		plain(w, status, text)
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		body, err := json.Marshal(report())
		if err != nil {
			http.Error(w, "encoding the health report: "+err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", "no-store")
		_, _ = w.Write(append(body, '\n'))
	})
	return mux
}

func plain(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	_, _ = w.Write([]byte(text))
}

// verbose lists one check or capability a line: [+] holds, [-] does not.
func verbose(r Report) string {
	var b strings.Builder
	line := func(ok bool, name, detail string) {
		mark := "[+]"
		if !ok {
			mark = "[-]"
		}
		fmt.Fprintf(&b, "%s %s", mark, name)
		if detail != "" {
			fmt.Fprintf(&b, ": %s", detail)
		}
		b.WriteByte('\n')
	}
	for _, c := range r.Checks {
		line(c.OK, c.Name, c.Detail)
	}
	names := make([]string, 0, len(r.Capabilities))
	for name := range r.Capabilities {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		line(r.Capabilities[name].OK, name, r.Capabilities[name].Cause)
	}
	return b.String()
}
