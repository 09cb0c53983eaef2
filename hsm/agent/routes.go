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
	mux.Handle("GET /v1/health", handle(s, "health", mayRead, func(context.Context, identity.Principal, none) (hsm.Info, error) {
		return s.Info(), nil
	}))
	mux.Handle("GET /v1/keys", handle(s, "inventory", mayRead, func(ctx context.Context, _ identity.Principal, _ none) (keysResponse, error) {
		keys, err := call(ctx, s.dog, "inventory", 5*s.cfg.CallTimeout, s.cfg.Token.Inventory)
		return keysResponse{keys}, err
	}))
	mux.Handle("POST /v1/sign", handle(s, "sign", maySomething(hsm.MaySign), func(ctx context.Context, by identity.Principal, req signRequest) (signResponse, error) {
		if n := len(req.Digests); n < 1 || n > hsm.MaxBatch {
			return signResponse{}, hsm.Errorf(hsm.ClassRequest, "sign", "%d digests: must be 1 to %d", n, hsm.MaxBatch)
		}
		for _, d := range req.Digests {
			if len(d) != hsm.DigestSize {
				return signResponse{}, hsm.Errorf(hsm.ClassRequest, "sign", "digest of %d octets: must be %d", len(d), hsm.DigestSize)
			}
		}
		k, err := s.usable("sign", by, req.Key, hsm.MaySign)
		if err != nil {
			return signResponse{}, err
		}
		sigs, err := s.sign(ctx, by.String(), k, req.Digests)
		return signResponse{sigs}, err
	}))
	mux.Handle("POST /v1/challenge", handle(s, "challenge", maySomething(hsm.MayChallenge), func(ctx context.Context, by identity.Principal, req challengeRequest) (challengeResponse, error) {
		if n := len(req.Nonce); n < hsm.MinNonce || n > hsm.MaxNonce || len(req.Group) < 1 || len(req.Group) > 64 {
			return challengeResponse{}, hsm.Errorf(hsm.ClassRequest, "challenge", "nonce of %d octets must be %d to %d, group name of %d must be 1 to 64", n, hsm.MinNonce, hsm.MaxNonce, len(req.Group))
		}
		k, err := s.usable("challenge", by, req.Key, hsm.MayChallenge)
		if err != nil {
			return challengeResponse{}, err
		}
		sig, err := s.challenge(ctx, by.String(), k, req)
		return challengeResponse{sig, s.cfg.Incarnation}, err
	}))
	mux.Handle("POST /v1/keys", handle(s, "generate", mayManage, func(ctx context.Context, by identity.Principal, spec hsm.KeySpec) (hsm.KeyRecord, error) {
		if err := spec.Check(); err != nil {
			return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, "generate", "%w", err)
		}
		return managed(ctx, s, by.String(), "generate", string(spec.ID), func() (hsm.KeyRecord, error) { return s.cfg.Token.Generate(spec) })
	}))
	mux.Handle("POST /v1/export", handle(s, "export", mayManage, func(ctx context.Context, by identity.Principal, req exportRequest) (hsm.Blob, error) {
		if _, err := s.cfg.Token.Key(req.Key); err != nil {
			return hsm.Blob{}, err
		}
		return managed(ctx, s, by.String(), "export", string(req.Key), func() (hsm.Blob, error) { return s.cfg.Token.Export(req.Key) })
	}))
	mux.Handle("POST /v1/import", handle(s, "import", mayManage, func(ctx context.Context, by identity.Principal, b hsm.Blob) (hsm.KeyRecord, error) {
		if err := b.Check(); err != nil {
			return hsm.KeyRecord{}, hsm.Errorf(hsm.ClassRequest, "import", "%w", err)
		}
		return managed(ctx, s, by.String(), "import", string(b.ID), func() (hsm.KeyRecord, error) { return s.cfg.Token.Import(b) })
	}))
	mux.Handle("GET /v1/transport-key", handle(s, "transport-key", mayManage, func(ctx context.Context, _ identity.Principal, _ none) (transportKey, error) {
		spki, err := call(ctx, s.dog, "transport-key", s.cfg.CallTimeout, s.cfg.Token.TransportKey)
		if err != nil {
			return transportKey{}, err
		}
		t, err := attest(s.cfg.Identity, spki)
		return transportKey{t}, err
	}))
	mux.Handle("POST /v1/domain", handle(s, "domain-generate", mayManage, func(ctx context.Context, by identity.Principal, req domainRequest) (none, error) {
		if err := hsm.CheckDomainName(req.KEK); err != nil {
			return none{}, hsm.Errorf(hsm.ClassRequest, "domain-generate", "%w", err)
		}
		return managed(ctx, s, by.String(), "domain-generate", req.KEK, func() (none, error) { return none{}, s.cfg.Token.GenerateDomain(req.KEK) })
	}))
	mux.Handle("POST /v1/domain/export", handle(s, "domain-export", mayManage, func(ctx context.Context, by identity.Principal, req transportKey) (wrappedDomain, error) {
		spki, to, err := attested(s.cfg.Identity, req.Transport, s.cfg.Now())
		if err != nil {
			return wrappedDomain{}, hsm.Errorf(hsm.ClassDenied, "domain-export", "%w", err)
		}
		return managed(ctx, s, by.String(), "domain-export", "to "+to.String(), func() (wrappedDomain, error) {
			wrapped, kek, err := s.cfg.Token.ExportDomain(spki)
			return wrappedDomain{kek, wrapped}, err
		})
	}))
	mux.Handle("POST /v1/domain/import", handle(s, "domain-import", mayManage, func(ctx context.Context, by identity.Principal, req wrappedDomain) (none, error) {
		if err := hsm.CheckDomainName(req.KEK); err != nil {
			return none{}, hsm.Errorf(hsm.ClassRequest, "domain-import", "%w", err)
		}
		return managed(ctx, s, by.String(), "domain-import", req.KEK, func() (none, error) {
			return none{}, s.cfg.Token.ImportDomain(req.KEK, req.Wrapped)
		})
	}))
	mux.Handle("/v1/", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		problem.Write(w, problem.New(http.StatusNotFound, "not-found", "no such operation"))
	}))
	reports := identity.Allow(health.Handler(s.Report), identity.Roles()...)
	for _, path := range []string{"/livez", "/readyz", "/healthz"} {
		mux.Handle("GET "+path, reports)
	}
	return mux
}

// none is the body of a request or response that has nothing to say.
type none = struct{}

func mayRead(role string) bool {
	for _, r := range readers {
		if string(r) == role {
			return true
		}
	}
	return false
}

func mayManage(role string) bool { return hsm.MayManage(role) }

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

// usable is the key, if this caller may use it so.
func (s *Server) usable(op string, by identity.Principal, id hsm.KeyID, may func(string, hsm.Purpose) bool) (hsm.KeyRecord, error) {
	k, err := s.cfg.Token.Key(id)
	if err != nil {
		return k, err
	}
	if !may(string(by.Role), k.Purpose) {
		return k, hsm.Errorf(hsm.ClassDenied, op, "role %s may not %s with keys of purpose %s", by.Role, op, k.Purpose)
	}
	return k, nil
}

// handle is every operation's frame: who calls, may they, decode, admit, act, answer, count.
func handle[In, Out any](s *Server, op string, may func(role string) bool, act func(context.Context, identity.Principal, In) (Out, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		out, err := func() (out Out, err error) {
			by, ok := identity.Peer(r)
			if !ok {
				return out, hsm.Errorf(hsm.ClassDenied, op, "no client certificate of this cluster")
			}
			if !may(string(by.Role)) {
				return out, hsm.Errorf(hsm.ClassDenied, op, "role %s may not %s", by.Role, op)
			}
			var in In
			if r.Method == http.MethodPost {
				if err := decode(http.MaxBytesReader(w, r.Body, maxBody), &in); err != nil {
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
			return act(r.Context(), by, in)
		}()
		if err != nil {
			s.metrics.calls.WithLabelValues(op, className(err)).Inc()
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
