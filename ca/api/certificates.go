package api

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"mime"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/gin-gonic/gin"

	"trivet/ca"
	"trivet/db"
	"trivet/identity"
	"trivet/problem"
)

const (
	idempotencyHeader = "Idempotency-Key"

	mediaJSON  = "application/json"
	mediaChain = "application/pem-certificate-chain" // RFC 8555 §9.1
	mediaCert  = "application/pkix-cert"             // RFC 2585
)

type issueBody struct {
	Profile string `json:"profile"`
	CA      string `json:"ca"`
	CSR     string `json:"csr"`
	Subject struct {
		CommonName string `json:"common_name"`
	} `json:"subject"`
	SANs      []sanJSON  `json:"sans"`
	NotAfter  *time.Time `json:"not_after"`
	Reference string     `json:"reference"`
}

type sanJSON struct {
	Type  string `json:"type"`
	Value string `json:"value"`
}

type certificateJSON struct {
	ID             string     `json:"id"`
	CA             string     `json:"ca"`
	Generation     int        `json:"generation"`
	Serial         string     `json:"serial"`
	Status         string     `json:"status"`
	Profile        string     `json:"profile"`
	ProfileVersion int        `json:"profile_version"`
	Subject        string     `json:"subject,omitempty"`
	SANs           []sanJSON  `json:"sans"`
	NotBefore      *time.Time `json:"not_before,omitempty"`
	NotAfter       *time.Time `json:"not_after,omitempty"`
	SHA256         string     `json:"sha256,omitempty"`
	SPKISHA256     string     `json:"spki_sha256,omitempty"`
	Requester      string     `json:"requester"`
	Reference      string     `json:"reference,omitempty"`
	Origin         string     `json:"origin"`
	Certificate    string     `json:"certificate,omitempty"` // PEM
	Chain          []string   `json:"chain,omitempty"`       // PEM, from the issuer's to the root's
	Revocation     *eventJSON `json:"revocation"`
}

type eventJSON struct {
	Reason         string     `json:"reason"`
	Date           time.Time  `json:"date"`
	InvalidityDate *time.Time `json:"invalidity_date"`
	Sequence       int        `json:"sequence"`
}

// issue answers 201 with the certificate, the same one for every repeat.
func (s *server) issue(c *gin.Context) {
	media, p := accepted(c.Request)
	if p != nil {
		s.fail(c, p)
		return
	}
	key, p := idempotencyKey(c.Request)
	if p != nil {
		s.fail(c, p)
		return
	}
	var body issueBody
	if p := decode(c.Writer, c.Request, &body); p != nil {
		s.fail(c, p)
		return
	}
	if p := body.check(); p != nil {
		s.fail(c, p)
		return
	}
	ctx, cancel := context.WithTimeout(c.Request.Context(), s.cfg.IssueTimeout)
	defer cancel()
	view, replayed, err := s.issueOne(ctx, body.request(caller(c), key))
	if err != nil {
		s.fail(c, err)
		return
	}
	if replayed {
		c.Header("Idempotency-Replayed", "true")
	}
	c.Header("Location", "/v1/certificates/"+view.Intent.Issuer+":"+hex.EncodeToString(view.Intent.Serial))
	s.answer(c, http.StatusCreated, media, view)
}

// issueOne issues a certificate, or finds the one that an earlier request with the same key got, with the status it has now.
func (s *server) issueOne(ctx context.Context, r ca.Request) (view *db.Certificate, replayed bool, err error) {
	issued, err := s.cfg.Issuer.Issue(ctx, r)
	if err != nil {
		return nil, false, err
	}
	view = &db.Certificate{
		Intent: db.Intent{Issuer: issued.Issuer, Serial: issued.Serial, Profile: issued.Profile, ProfileVersion: uint32(issued.ProfileVersion),
			Requester: issued.Requester, Reference: issued.Reference},
		Outcome: &db.Outcome{Kind: db.OutcomeCert, DER: issued.DER},
	}
	if issued.Replayed {
		// The certificate is the same for ever; its status is not.
		now, err := s.cfg.Viewer.Certificate(ctx, issued.Issuer, issued.Serial)
		switch {
		case err != nil:
			return nil, true, err
		case now != nil && now.Outcome != nil && now.Outcome.Kind == db.OutcomeCert:
			view = now
		}
	}
	return view, issued.Replayed, nil
}

// request is what a checked body asks for.
func (b *issueBody) request(by identity.Principal, key string) ca.Request {
	r := ca.Request{
		Principal: by.String(), IdempotencyKey: key, Profile: b.Profile, CA: b.CA, CSR: []byte(b.CSR),
		Subject: ca.Subject{CommonName: b.Subject.CommonName}, NotAfter: b.NotAfter, Reference: b.Reference,
	}
	for _, san := range b.SANs {
		r.SANs = append(r.SANs, ca.SAN{Type: san.Type, Value: san.Value})
	}
	return r
}

func (b *issueBody) check() *problem.Problem {
	switch {
	case b.Profile == "":
		return malformed("profile", "it is missing")
	case b.CSR == "":
		return malformed("csr", "it is missing: send a PKCS #10 request as PEM")
	case b.NotAfter != nil && (b.NotAfter.Year() < 2000 || b.NotAfter.Year() > 9999):
		return malformed("not_after", "want a date that a certificate can hold")
	}
	return nil
}

func idempotencyKey(r *http.Request) (string, *problem.Problem) {
	switch values := r.Header.Values(idempotencyHeader); {
	case len(values) == 0:
		return "", malformed(idempotencyHeader, "the header is missing: send a value of your own choice, and the same with every repeat of the request")
	case len(values) > 1:
		return "", malformed(idempotencyHeader, "the header is given more than once")
	case !validKey(values[0]):
		return "", malformed(idempotencyHeader, "want 1 to 255 printable ASCII characters")
	default:
		return values[0], nil
	}
}

func validKey(key string) bool {
	return len(key) >= 1 && len(key) <= 255 && !strings.ContainsFunc(key, func(r rune) bool { return r < 0x20 || r > 0x7e })
}

// accepted chooses the media type of a certificate's answer, before anything is done for the request. The first of equals wins.
func accepted(r *http.Request) (string, *problem.Problem) {
	header := strings.Join(r.Header.Values("Accept"), ",")
	if strings.TrimSpace(header) == "" {
		return mediaJSON, nil
	}
	best, quality := "", 0.0
	for _, one := range strings.Split(header, ",") {
		kind, params, err := mime.ParseMediaType(one)
		if err != nil {
			continue
		}
		q := 1.0
		if text, ok := params["q"]; ok {
			if q, err = strconv.ParseFloat(text, 64); err != nil || q < 0 || q > 1 {
				continue
			}
		}
		switch kind {
		case "*/*", "application/*":
			kind = mediaJSON
		case mediaJSON, mediaChain, mediaCert:
		default:
			continue
		}
		if q > quality {
			best, quality = kind, q
		}
	}
	if best == "" {
		p := problem.New(http.StatusNotAcceptable, "not-acceptable", "certificates come as "+mediaJSON+", "+mediaChain+" or "+mediaCert)
		p.Field = "Accept"
		return "", p
	}
	return best, nil
}

// show answers with one certificate.
func (s *server) show(c *gin.Context) {
	media, p := accepted(c.Request)
	if p != nil {
		s.fail(c, p)
		return
	}
	ctx, cancel := context.WithTimeout(c.Request.Context(), s.cfg.ReadTimeout)
	defer cancel()
	cert, err := s.find(ctx, c)
	if err != nil {
		s.fail(c, err)
		return
	}
	if cert.Outcome != nil && cert.Outcome.Kind == db.OutcomeAbandoned {
		s.fail(c, &ca.Error{Name: ca.RequestAbandoned, Field: "id", Detail: "the request was abandoned: no certificate has this serial, and it counts as revoked"})
		return
	}
	if cert.Outcome == nil && media != mediaJSON {
		s.fail(c, &ca.Error{Name: ca.RequestInProgress, Field: "id", Detail: "the certificate is not finished yet"})
		return
	}
	s.answer(c, http.StatusOK, media, cert)
}

// answer sends a certificate that was released, in the form asked for.
func (s *server) answer(c *gin.Context, status int, media string, cert *db.Certificate) {
	c.Header("Cache-Control", "no-store")
	c.Header("Vary", "Accept")
	switch media {
	case mediaCert:
		c.Data(status, mediaCert, cert.Outcome.DER)
	case mediaChain:
		chain := encodePEM(cert.Outcome.DER)
		for _, der := range s.chain(cert.Intent.Issuer) {
			chain += encodePEM(der)
		}
		c.Data(status, mediaChain, []byte(chain))
	default:
		view, err := s.view(cert)
		if err != nil {
			s.fail(c, err)
			return
		}
		if cert.Outcome != nil {
			view.Certificate = encodePEM(cert.Outcome.DER)
			view.Chain = s.chainPEM(cert.Intent.Issuer)
		}
		c.JSON(status, view)
	}
}

// chain returns the certificates above one of that issuer.
func (s *server) chain(issuer string) [][]byte {
	a, ok := s.cfg.Issuer.Authorities().Issuer(issuer)
	if !ok {
		return nil
	}
	var out [][]byte
	for _, cert := range a.Chain {
		out = append(out, cert.Raw)
	}
	return out
}

func (s *server) chainPEM(issuer string) (out []string) {
	for _, der := range s.chain(issuer) {
		out = append(out, encodePEM(der))
	}
	return out
}

func encodePEM(der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// view is a certificate without its own bytes.
func (s *server) view(c *db.Certificate) (*certificateJSON, error) {
	name, generation := splitIssuer(c.Intent.Issuer)
	serial := hex.EncodeToString(c.Intent.Serial)
	v := &certificateJSON{
		ID: c.Intent.Issuer + ":" + serial, CA: name, Generation: generation, Serial: serial,
		Profile: c.Intent.Profile, ProfileVersion: int(c.Intent.ProfileVersion), SANs: []sanJSON{},
		Requester: c.Intent.Requester, Reference: c.Intent.Reference, Origin: "issued",
	}
	if c.Outcome != nil && len(c.Outcome.DER) > 0 {
		cert, err := x509.ParseCertificate(c.Outcome.DER)
		if err != nil {
			return nil, fmt.Errorf("parsing the certificate of %s: %w", v.ID, err)
		}
		c.Outcome.NotAfter = cert.NotAfter
		v.describe(cert)
	}
	v.Status = c.Status(s.cfg.Now())
	if r := c.Revocation; r != nil && (v.Status == db.StatusRevoked || v.Status == db.StatusHeld) {
		v.Revocation = &eventJSON{Reason: ca.Reason(r.Reason).String(), Date: r.Date.UTC(), Sequence: int(r.N)}
		if !r.InvalidityDate.IsZero() {
			t := r.InvalidityDate.UTC()
			v.Revocation.InvalidityDate = &t
		}
	}
	return v, nil
}

func (v *certificateJSON) describe(cert *x509.Certificate) {
	v.Subject = cert.Subject.String()
	for _, name := range cert.DNSNames {
		v.SANs = append(v.SANs, sanJSON{"dns", name})
	}
	for _, ip := range cert.IPAddresses {
		v.SANs = append(v.SANs, sanJSON{"ip", ip.String()})
	}
	for _, address := range cert.EmailAddresses {
		v.SANs = append(v.SANs, sanJSON{"email", address})
	}
	for _, uri := range cert.URIs {
		v.SANs = append(v.SANs, sanJSON{"uri", uri.String()})
	}
	notBefore, notAfter := cert.NotBefore.UTC(), cert.NotAfter.UTC()
	v.NotBefore, v.NotAfter = &notBefore, &notAfter
	whole, key := sha256.Sum256(cert.Raw), sha256.Sum256(cert.RawSubjectPublicKeyInfo)
	v.SHA256, v.SPKISHA256 = hex.EncodeToString(whole[:]), hex.EncodeToString(key[:])
}

func splitIssuer(issuer string) (ca string, generation int) {
	i := strings.LastIndex(issuer, "-g")
	if i < 0 {
		return issuer, 0
	}
	n, err := strconv.Atoi(issuer[i+2:])
	if err != nil {
		return issuer, 0
	}
	return issuer[:i], n
}

var (
	issuerForm = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}-g[1-9][0-9]{0,5}$`)
	serialForm = regexp.MustCompile(`^([0-9a-f]{2}){1,20}$`)
)

// find returns the certificate that :id names, if there is one and the caller may see it. Whatever of others' a caller may not see is not found.
func (s *server) find(ctx context.Context, c *gin.Context) (*db.Certificate, error) {
	id := c.Param("id")
	issuer, text, named := strings.Cut(id, ":")
	if !named {
		text = id
	}
	if !serialForm.MatchString(text) || named && !issuerForm.MatchString(issuer) {
		return nil, malformed("id", "want {ca}-g{n}:{serial} or a serial, the serial in lower-case hex")
	}
	serial, err := hex.DecodeString(text)
	if err != nil {
		return nil, malformed("id", "the serial is not hex")
	}
	if !named {
		if issuer, err = s.onlyIssuer(ctx, c, serial); err != nil {
			return nil, err
		}
	}
	cert, err := s.cfg.Viewer.Certificate(ctx, issuer, serial)
	if err != nil {
		return nil, err
	}
	if cert == nil || !maySee(caller(c), cert) {
		return nil, notFound()
	}
	return cert, nil
}

// onlyIssuer finds whose the serial is, among what the caller may see.
func (s *server) onlyIssuer(ctx context.Context, c *gin.Context, serial []byte) (string, error) {
	var all []db.Certificate
	err := s.cfg.Rounds.Complete(ctx, func() (err error) {
		all, err = s.cfg.Record.CertificatesBySerial(ctx, serial)
		return err
	})
	if ca.NameOf(err) != "" {
		return "", err
	}
	if err != nil {
		return "", databaseProblem(err)
	}
	var issuers []string
	for i := range all {
		if maySee(caller(c), &all[i]) {
			issuers = append(issuers, all[i].Intent.Issuer)
		}
	}
	switch len(issuers) {
	case 0:
		return "", notFound()
	case 1:
		return issuers[0], nil
	}
	return "", &ca.Error{Name: ca.AmbiguousSerial, Field: "id", Detail: "several generations have the serial: " + strings.Join(issuers, ", ") + "; ask for {ca}-g{n}:{serial}"}
}

func notFound() error {
	return &ca.Error{Name: ca.NotFound, Field: "id", Detail: "there is no such certificate"}
}

func databaseProblem(err error) error {
	return &ca.Error{Name: ca.DatabaseUnavailable, Detail: "no database node can be used now: repeat the request", RetryAfter: time.Second, Err: err}
}

// maySee tells whether a certificate exists for the caller: requesters and RAs see their own.
func maySee(p identity.Principal, cert *db.Certificate) bool {
	switch p.Role {
	case identity.RoleRequester, identity.RoleRA:
		return cert.Intent.Requester == p.String()
	case identity.RoleCAOperator, identity.RoleAdmin, identity.RoleAuditor:
		return true
	}
	return false
}
