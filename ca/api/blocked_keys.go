package api

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/gin-gonic/gin"

	"trivet/ca"
	"trivet/db"
	"trivet/identity"
	"trivet/problem"
)

// Blocker blocks keys; *ca.Blocker does. Its errors carry a *ca.Error.
type Blocker interface {
	Block(ctx context.Context, q ca.BlockRequest) (*ca.Blocking, error)
	Get(ctx context.Context, spki []byte, after uint32) (*ca.Blocking, error)
	List(ctx context.Context, after []byte, limit int) ([]db.BlockedKey, error)
}

type blockBody struct {
	SPKISHA256  string         `json:"spki_sha256"` // one of the three
	Certificate string         `json:"certificate"`
	CSR         string         `json:"csr"`
	Reason      string         `json:"reason"`
	Comment     string         `json:"comment"`
	Revoke      bool           `json:"revoke"`
	Grant       identity.Grant `json:"grant"`
}

type blockedKeyJSON struct {
	SPKISHA256   string        `json:"spki_sha256"`
	Sequence     uint32        `json:"sequence"`
	Reason       string        `json:"reason"`
	Comment      string        `json:"comment"`
	Actor        string        `json:"actor"`
	Date         time.Time     `json:"date"`
	Certificates []keyUseJSON  `json:"certificates,omitempty"`
	Next         *string       `json:"next,omitempty"`
	Failed       []failureJSON `json:"failed,omitempty"`
}

type keyUseJSON struct {
	ID        string     `json:"id"`
	Sequence  uint32     `json:"sequence"`
	Status    string     `json:"status"`
	Profile   string     `json:"profile"`
	Requester string     `json:"requester"`
	NotAfter  *time.Time `json:"not_after,omitempty"`
	Reason    string     `json:"reason,omitempty"` // of its revocation
}

type failureJSON struct {
	ID      string `json:"id"`
	Problem string `json:"problem"`
	Detail  string `json:"detail"`
}

type blockedKeysJSON struct {
	BlockedKeys []blockedKeyJSON `json:"blocked_keys"`
	Next        *string          `json:"next"`
}

// block answers 200 with the block that stands and every certificate that the key has; 202 if some of those that were to be revoked are not.
func (s *server) block(c *gin.Context) {
	var body blockBody
	if p := decode(c.Writer, c.Request, &body); p != nil {
		s.fail(c, p)
		return
	}
	spki, p := body.key()
	if p != nil {
		s.fail(c, p)
		return
	}
	q := ca.BlockRequest{SPKI: spki, Reason: body.Reason, Comment: body.Comment, Revoke: body.Revoke, Actor: caller(c)}
	by, err := s.twoPersons(q, body.Grant)
	if err != nil {
		s.fail(c, &ca.Error{Name: ca.Forbidden, Field: "grant", Detail: err.Error()})
		return
	}
	q.Approvers = by
	ctx, cancel := context.WithTimeout(c.Request.Context(), s.cfg.RevokeTimeout)
	defer cancel()
	var done *ca.Blocking
	err = s.cfg.Rounds.Complete(ctx, func() (err error) { // the answer names every certificate of the key
		done, err = s.cfg.Blocker.Block(ctx, q)
		return err
	})
	if err != nil {
		s.fail(c, err)
		return
	}
	view := s.viewBlocking(done)
	status := http.StatusOK
	if len(view.Failed) > 0 {
		status = http.StatusAccepted
	}
	c.JSON(status, view)
}

// key finds the key that the body names, in one of three ways.
func (b *blockBody) key() ([]byte, *problem.Problem) {
	given := 0
	for _, text := range []string{b.SPKISHA256, b.Certificate, b.CSR} {
		if text != "" {
			given++
		}
	}
	if given != 1 {
		return nil, malformed("spki_sha256", "want one of spki_sha256, certificate and csr")
	}
	if b.SPKISHA256 != "" {
		return parseSPKI("spki_sha256", b.SPKISHA256)
	}
	field, kind, text := "certificate", "CERTIFICATE", b.Certificate
	if b.CSR != "" {
		field, kind, text = "csr", "CERTIFICATE REQUEST", b.CSR
	}
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != kind {
		return nil, malformed(field, "want a PEM block "+kind)
	}
	var spki []byte
	if b.CSR != "" {
		csr, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil {
			return nil, malformed(field, "the CSR cannot be read")
		}
		spki = csr.RawSubjectPublicKeyInfo
	} else {
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, malformed(field, "the certificate cannot be read")
		}
		spki = cert.RawSubjectPublicKeyInfo
	}
	sum := sha256.Sum256(spki)
	return sum[:], nil
}

func parseSPKI(field, text string) ([]byte, *problem.Problem) {
	spki, err := hex.DecodeString(text)
	if err != nil || len(spki) != sha256.Size {
		return nil, malformed(field, "want 64 hex digits: the SHA-256 of the DER SubjectPublicKeyInfo")
	}
	return spki, nil
}

// twoPersons tells who else agreed. The caller is one person, known by TLS from end to end; another of the same role has signed exactly this request,
// which names the caller as its proposer.
func (s *server) twoPersons(q ca.BlockRequest, g identity.Grant) ([]string, error) {
	action, object, detail := q.Approval()
	switch r := g.Request; {
	case r.Action == "":
		return nil, errors.New("two persons block a key: send the grant with another ca-operator's approval, as `pkictl blocked-key add` makes it")
	case r.Action != action || r.Object != object || !maps.Equal(r.Detail, detail):
		return nil, errors.New("what was approved is not this: key, reason, comment and revoke must be the same")
	case r.Proposer != q.Actor.String():
		return nil, errors.New("it was proposed by " + clip(r.Proposer) + ", and whoever proposes it must send it")
	}
	by, err := s.cfg.Identity.Approved(g.Request, g.Approvals, 1, s.cfg.Now(), identity.RoleCAOperator)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, p := range by {
		names = append(names, p.String())
	}
	return names, nil
}

// listBlocked answers with one page of the blocked keys, without their certificates.
func (s *server) listBlocked(c *gin.Context) {
	query, limit, p := pageOf(c)
	if p != nil {
		s.fail(c, p)
		return
	}
	var after []byte
	if query["cursor"] != "" {
		if after, p = parseSPKI("cursor", query["cursor"]); p != nil {
			s.fail(c, malformed("cursor", "it is none that this interface gave"))
			return
		}
	}
	ctx, cancel := context.WithTimeout(c.Request.Context(), s.cfg.ReadTimeout)
	defer cancel()
	var found []db.BlockedKey
	err := s.cfg.Rounds.Complete(ctx, func() (err error) {
		found, err = s.cfg.Blocker.List(ctx, after, limit)
		return err
	})
	if err != nil {
		s.fail(c, err)
		return
	}
	page := blockedKeysJSON{BlockedKeys: []blockedKeyJSON{}}
	for i := range found {
		page.BlockedKeys = append(page.BlockedKeys, viewBlocked(&found[i]))
	}
	if len(found) == limit {
		page.Next = &page.BlockedKeys[limit-1].SPKISHA256
	}
	c.JSON(http.StatusOK, page)
}

// showBlocked answers with one blocked key and a page of its certificates.
func (s *server) showBlocked(c *gin.Context) {
	spki, p := parseSPKI("spki", c.Param("spki"))
	if p != nil {
		s.fail(c, p)
		return
	}
	query, p := parameters(c, "cursor")
	if p != nil {
		s.fail(c, p)
		return
	}
	var after uint64
	if query["cursor"] != "" {
		var err error
		if after, err = strconv.ParseUint(query["cursor"], 10, 32); err != nil {
			s.fail(c, malformed("cursor", "it is none that this interface gave"))
			return
		}
	}
	ctx, cancel := context.WithTimeout(c.Request.Context(), s.cfg.ReadTimeout)
	defer cancel()
	var found *ca.Blocking
	err := s.cfg.Rounds.Complete(ctx, func() (err error) {
		found, err = s.cfg.Blocker.Get(ctx, spki, uint32(after))
		return err
	})
	switch {
	case err != nil:
		s.fail(c, err)
	case found == nil:
		s.fail(c, &ca.Error{Name: ca.NotFound, Field: "spki", Detail: "the key is not blocked"})
	default:
		c.JSON(http.StatusOK, s.viewBlocking(found))
	}
}

func viewBlocked(b *db.BlockedKey) blockedKeyJSON {
	return blockedKeyJSON{SPKISHA256: hex.EncodeToString(b.SPKI), Sequence: b.N, Reason: b.Reason, Comment: b.Comment, Actor: b.Actor, Date: b.Created.UTC()}
}

func (s *server) viewBlocking(b *ca.Blocking) blockedKeyJSON {
	v := viewBlocked(&b.BlockedKey)
	v.Certificates = []keyUseJSON{}
	for i := range b.Uses {
		u := &b.Uses[i]
		one := keyUseJSON{
			ID: u.Intent.Issuer + ":" + hex.EncodeToString(u.Intent.Serial), Sequence: u.N, Status: u.Status(s.cfg.Now()),
			Profile: u.Intent.Profile, Requester: u.Intent.Requester,
		}
		if u.Outcome != nil && !u.Outcome.NotAfter.IsZero() {
			end := u.Outcome.NotAfter.UTC()
			one.NotAfter = &end
		}
		if u.Revocation.Revoked() {
			one.Reason = ca.Reason(u.Revocation.Reason).String()
		}
		if r := u.Revoked; r != nil {
			one.Reason = r.Reason.String()
			if one.Status != db.StatusPending {
				one.Status = r.Status()
			}
			if !r.Reach.Effective() {
				v.Failed = append(v.Failed, failureJSON{one.ID, "not-effective", "recorded, and not yet shown by every responder: repeat the request"})
			}
		}
		if u.Err != nil {
			p := toProblem(u.Err)
			v.Failed = append(v.Failed, failureJSON{one.ID, p.Name(), p.Detail})
		}
		v.Certificates = append(v.Certificates, one)
	}
	slices.SortFunc(v.Certificates, func(a, b keyUseJSON) int { return int(a.Sequence) - int(b.Sequence) })
	if b.Next > 0 {
		next := strconv.FormatUint(uint64(b.Next), 10)
		v.Next = &next
	}
	return v
}
