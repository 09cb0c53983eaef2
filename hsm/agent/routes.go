package agent

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"

	"trivet/health"
	"trivet/hsm"
	"trivet/identity"
	"trivet/problem"
)

// readers may see the inventory: who signs, who synchronises, who checks.
var readers = []identity.Role{
	identity.RoleCA, identity.RoleOCSP, identity.RoleSync, identity.RoleCeremony, identity.RoleFsck,
	identity.RoleCAOperator, identity.RoleAdmin, identity.RoleAuditor, identity.RoleSRE,
}

func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /v1/health", handle(s, route{op: "health", may: mayRead}, func(context.Context, identity.Principal, none) (hsm.Info, error) {
		return s.Info(), nil
	}))
	mux.Handle("GET /v1/keys", handle(s, route{"inventory", mayRead, 0, true}, s.inventory))
	mux.Handle("GET /v1/transport-key", handle(s, route{"transport-key", mayManage, 0, false}, s.transportKey))
	mux.Handle("POST /v1/sign", handle(s, route{"sign", maySomething(hsm.MaySign), maxSign, false}, s.sign))
	mux.Handle("POST /v1/challenge", handle(s, route{"challenge", maySomething(hsm.MayChallenge), fixed, false}, s.challenge))
	mux.Handle("POST /v1/keys", handle(s, route{"generate", mayManage, fixed, true}, s.generate))
	mux.Handle("POST /v1/export", handle(s, route{"export", mayManage, fixed, true}, s.export))
	mux.Handle("POST /v1/import", handle(s, route{"import", mayManage, maxBlobBody, true}, s.importKey))
	mux.Handle("POST /v1/adopt", handle(s, route{"adopt", mayManage, maxWithKey, true}, s.adopt))
	mux.Handle("POST /v1/destroy", handle(s, route{"destroy", mayManage, maxWithKey, true}, s.destroy))
	mux.Handle("POST /v1/bury", handle(s, route{"bury", mayManage, maxWithKey, true}, s.bury))
	mux.Handle("POST /v1/retire", handle(s, route{"retire", mayManage, maxWithKey, true}, s.retire))
	mux.Handle("POST /v1/domain", handle(s, route{"domain-generate", mayManage, fixed, true}, s.domainGenerate))
	mux.Handle("POST /v1/domain/export", handle(s, route{"domain-export", mayManage, maxWithRoute, true}, s.domainExport))
	mux.Handle("POST /v1/domain/import", handle(s, route{"domain-import", mayManage, maxDomain, true}, s.domainImport))
	mux.Handle("POST /v1/domain/rotate", handle(s, route{"domain-rotate", mayManage, fixed, true}, s.domainRotate))
	mux.Handle("POST /v1/domain/drop", handle(s, route{"domain-drop", mayManage, fixed, true}, s.domainDrop))
	mux.Handle("POST /v1/domain/forget", handle(s, route{"domain-forget", mayManage, fixed, true}, s.domainForget))
	mux.Handle("POST /v1/domain/backup", handle(s, route{"backup", mayManage, maxWithKey, true}, s.backup))
	mux.Handle("POST /v1/epoch", handle(s, route{"epoch", mayManage, maxAct, true}, s.setEpoch))
	mux.Handle("POST /v1/pin/rotate", handle(s, route{opRotatePIN, mayManage, maxPINs, true}, s.rotatePIN))
	mux.Handle("POST /v1/activate", handle(s, route{opActivate, mayActivate, fixed, true}, s.activate))
	mux.Handle("/v1/", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		problem.Write(w, problem.New(http.StatusNotFound, "not-found", "no such operation"))
	}))
	reports := identity.Allow(health.Handler(s.Report), identity.Roles()...)
	for _, path := range []string{"/livez", "/readyz", "/healthz"} {
		mux.Handle("GET "+path, reports)
	}
	return mux
}

// route is one operation: who may ask for it, how long its body may be, and whether it is served one at a time.
type route struct {
	op    string
	may   func(role string) bool
	limit int64
	alone bool
}

func mayRead(role string) bool {
	for _, r := range readers {
		if string(r) == role {
			return true
		}
	}
	return false
}

// mayManage is who carries requests. What cannot be undone is decided by the approvals that come with them.
func mayManage(role string) bool { return hsm.MayManage(role) }

// mayActivate is who may know a PIN: people.
func mayActivate(role string) bool {
	return role == string(identity.RoleAdmin) || role == string(identity.RoleCAOperator)
}

// maySomething lets a role in that may use keys of some purpose; usable then looks at the key's own.
func maySomething(may func(string, hsm.Purpose) bool) func(string) bool {
	return func(role string) bool {
		for _, p := range hsm.Purposes() {
			if may(role, p) {
				return true
			}
		}
		return false
	}
}

// handle is every operation's frame: who calls, may they, decode, admit, act, answer, count.
func handle[In, Out any](s *Server, route route, act func(context.Context, identity.Principal, In) (Out, error)) http.Handler {
	op := route.op
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		out, err := func() (out Out, err error) {
			by, ok := identity.Peer(r)
			if !ok {
				return out, hsm.Errorf(hsm.ClassDenied, op, "no client certificate of this cluster")
			}
			if !route.may(string(by.Role)) {
				return out, hsm.Errorf(hsm.ClassDenied, op, "role %s may not %s", by.Role, op)
			}
			var in In
			if r.Method == http.MethodPost {
				if err := decode(http.MaxBytesReader(w, r.Body, route.limit), &in); err != nil {
					return out, err
				}
			}
			if op != "health" { // answers from memory, also when the queue is full
				release, err := s.dog.admit(op)
				if err != nil {
					return out, err
				}
				defer release()
			}
			if route.alone {
				release, err := s.dog.alone(r.Context(), op)
				if err != nil {
					return out, err
				}
				defer release()
			}
			return act(r.Context(), by, in)
		}()
		if err != nil {
			s.metrics.calls.WithLabelValues(op, className(err)).Inc()
			if hsm.ClassOf(err) == hsm.ClassDenied {
				by, _ := identity.Peer(r)
				s.cfg.Log.Warn("denied", "caller", by.String(), "op", op, "cause", err)
			}
			problem.Write(w, toProblem(err))
			return
		}
		s.metrics.calls.WithLabelValues(op, "ok").Inc()
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", "no-store")
		_ = json.NewEncoder(w).Encode(out) // the caller is gone when this fails
	})
}

// malformed is a body that is no request of ours.
type malformed struct {
	status int
	err    error
}

func (m *malformed) Error() string { return m.err.Error() }

// decode is strict: unknown fields and anything after the value are refused.
func decode(body io.Reader, into any) error {
	d := json.NewDecoder(body)
	d.DisallowUnknownFields()
	err := d.Decode(into)
	if err == nil {
		if _, more := d.Token(); more != io.EOF {
			err = errors.New("something follows the JSON value")
		}
	}
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return &malformed{http.StatusRequestEntityTooLarge, err}
	}
	return &malformed{http.StatusBadRequest, err}
}

func className(err error) string {
	if c := hsm.ClassOf(err); c != 0 {
		return c.String()
	}
	return hsm.ClassRequest.String()
}
