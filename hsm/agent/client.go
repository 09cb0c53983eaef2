package agent

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"trivet/hsm"
	"trivet/identity"
	"trivet/problem"
)

// Client speaks to one hsmd over mTLS (HTTP/1.1 with keep-alive). It is safe for concurrent use, never retries, and
// wants a deadline on every context. Every error is an *hsm.Error; an agent that cannot be reached, or does not answer
// in time, is ClassDevice with the transport's error inside.
type Client struct {
	name, base string
	http       *http.Client
}

// maxAnswer bounds what is read of an answer: an inventory of 10,000 keys is about 6 MB.
const maxAnswer = 16 << 20

// NewClient makes a client of the member called name at addr (host:port); whoever answers there must be the hsmd of
// exactly that name. It connects to nothing yet.
func NewClient(name, addr string, id *identity.Identity) *Client {
	config := id.ClientTLS(identity.RoleHSMD)
	chain := config.VerifyConnection
	config.VerifyConnection = func(cs tls.ConnectionState) error {
		if chain != nil {
			if err := chain(cs); err != nil {
				return err
			}
		}
		p, err := identity.FromCertificate(cs.PeerCertificates[0])
		if err != nil {
			return err
		}
		if p.Name != name {
			return fmt.Errorf("peer is %s, want the hsmd called %s", p, name)
		}
		return nil
	}
	return &Client{name: name, base: "https://" + addr, http: &http.Client{Transport: &http.Transport{
		TLSClientConfig: config, MaxIdleConnsPerHost: 64, IdleConnTimeout: 90 * time.Second,
		DialContext:         (&net.Dialer{Timeout: 2 * time.Second, KeepAlive: 5 * time.Second}).DialContext,
		TLSHandshakeTimeout: 2 * time.Second, DisableCompression: true,
	}, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}}
}

// Name is the member's name.
func (c *Client) Name() string { return c.name }

// Close closes idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Health says what the member is and how its own test signature went last.
func (c *Client) Health(ctx context.Context) (info hsm.Info, err error) {
	err = c.do(ctx, "health", http.MethodGet, "/v1/health", nil, &info)
	return info, err
}

// Inventory lists every key in the token, foreign ones too.
func (c *Client) Inventory(ctx context.Context) ([]hsm.KeyRecord, error) {
	var out keysResponse
	err := c.do(ctx, "inventory", http.MethodGet, "/v1/keys", nil, &out)
	return out.Keys, err
}

// Sign returns one signature per digest, as hsm.Verify takes them, in order: all or an error. At most hsm.MaxBatch digests.
// The signatures are not verified here.
func (c *Client) Sign(ctx context.Context, req hsm.SignRequest) ([][]byte, error) {
	var out signResponse
	if err := c.do(ctx, "sign", http.MethodPost, "/v1/sign", req, &out); err != nil {
		return nil, err
	}
	if len(out.Signatures) != len(req.Digests) {
		return nil, hsm.Errorf(hsm.ClassDevice, "sign", "member %s gave %d signatures for %d digests", c.name, len(out.Signatures), len(req.Digests))
	}
	return out.Signatures, nil
}

// Challenge returns the member's signature over hsm.ChallengeDigest(algorithm, group, c.Name(), incarnation, key, nonce), to be
// verified by the caller. The nonce has hsm.MinNonce to hsm.MaxNonce octets.
func (c *Client) Challenge(ctx context.Context, group string, key hsm.KeyID, nonce []byte) (sig []byte, incarnation string, err error) {
	var out challengeResponse
	err = c.do(ctx, "challenge", http.MethodPost, "/v1/challenge", challengeRequest{group, key, nonce}, &out)
	return out.Signature, out.Incarnation, err
}

// Generate makes a key in the token. Repeating it with the same spec returns the key that is there.
func (c *Client) Generate(ctx context.Context, spec hsm.KeySpec) (k hsm.KeyRecord, err error) {
	err = c.do(ctx, "generate", http.MethodPost, "/v1/keys", spec, &k)
	return k, err
}

// Export wraps a key with the domain key called kek; empty is the current one.
func (c *Client) Export(ctx context.Context, key hsm.KeyID, kek string) (b hsm.Blob, err error) {
	err = c.do(ctx, "export", http.MethodPost, "/v1/export", exportRequest{key, kek}, &b)
	return b, err
}

// Import unwraps a key into the token and returns it once it has made a signature that verifies with blob.SPKI.
// Repeating it returns the key that is there; another key with the same id is refused and left alone.
func (c *Client) Import(ctx context.Context, blob hsm.Blob) (k hsm.KeyRecord, err error) {
	err = c.do(ctx, "import", http.MethodPost, "/v1/import", blob, &k)
	return k, err
}

// Adopt takes a key from outside into the token, as two people approved. Repeating it returns the key that is there.
func (c *Client) Adopt(ctx context.Context, req hsm.AdoptRequest) (k hsm.KeyRecord, err error) {
	err = c.do(ctx, "adopt", http.MethodPost, "/v1/adopt", req, &k)
	return k, err
}

// Destroy removes the member's copy of a key for good, as two people approved; the id is taken in there never again.
// Nothing happens when it is gone already.
func (c *Client) Destroy(ctx context.Context, req hsm.DestroyRequest) error {
	return c.do(ctx, "destroy", http.MethodPost, "/v1/destroy", req, &none{})
}

// Bury has the member remember that a key was destroyed, as two people once approved, though the approval may have expired:
// the id is used and taken in there never again. A copy that the member holds stays until it is destroyed.
func (c *Client) Bury(ctx context.Context, req hsm.DestroyRequest) error {
	return c.do(ctx, "bury", http.MethodPost, "/v1/bury", req, &none{})
}

// Retire has the member remember that a key signs no more, as two people once approved, though the approval may have expired.
// The member's copy stays.
func (c *Client) Retire(ctx context.Context, req hsm.RetireRequest) error {
	return c.do(ctx, "retire", http.MethodPost, "/v1/retire", req, &none{})
}

// TransportKey returns the member's transport key with its agent's signature: opaque octets, to be handed to
// ExportDomain of another member; TransportFingerprint opens them.
func (c *Client) TransportKey(ctx context.Context) (transport []byte, err error) {
	var out transportKey
	err = c.do(ctx, "transport-key", http.MethodGet, "/v1/transport-key", nil, &out)
	return out.Transport, err
}

// GenerateDomain makes the domain key called kek; nothing happens when the token holds it already. The first one is the
// current one, a second one the next, and a third is refused.
func (c *Client) GenerateDomain(ctx context.Context, kek string) error {
	return c.do(ctx, "domain-generate", http.MethodPost, "/v1/domain", domainRequest{kek}, &none{})
}

// ExportDomain wraps a domain key for the member whose TransportKey is given. What comes back is opaque: the member's agent
// has signed where it comes from and to whom it goes.
func (c *Client) ExportDomain(ctx context.Context, req hsm.DomainRequest) (wrapped []byte, kek string, err error) {
	var out wrappedDomain
	err = c.do(ctx, "domain-export", http.MethodPost, "/v1/domain/export", req, &out)
	return out.Wrapped, out.KEK, err
}

// ImportDomain takes the domain key called kek as another member's ExportDomain made it for this one. Bare octets, as
// custodians make them from a backup (see agent.Token.ImportDomain), are taken only by a token that holds no domain key and
// no key of a group. Nothing happens when the token holds that very key.
func (c *Client) ImportDomain(ctx context.Context, kek string, wrapped []byte) error {
	return c.do(ctx, "domain-import", http.MethodPost, "/v1/domain/import", wrappedDomain{kek, wrapped}, &none{})
}

// Rotate makes the next domain key, which must be called kek, the current one.
func (c *Client) Rotate(ctx context.Context, kek string) error {
	return c.do(ctx, "domain-rotate", http.MethodPost, "/v1/domain/rotate", domainRequest{kek}, &none{})
}

// DropDomain removes the domain key called kek: the one that is not current, or the last one when no key of a group is left.
func (c *Client) DropDomain(ctx context.Context, kek string) error {
	return c.do(ctx, "domain-drop", http.MethodPost, "/v1/domain/drop", domainRequest{kek}, &none{})
}

// ForgetTransport has the member forget a transport key, by its hex SHA-256: a domain key goes to it no more unless people
// approve it anew. Nothing happens when the member does not know it.
func (c *Client) ForgetTransport(ctx context.Context, transport string) error {
	return c.do(ctx, "domain-forget", http.MethodPost, "/v1/domain/forget", forgetRequest{transport}, &none{})
}

// BackupDomain wraps the current domain key for the custodians' key, as two people approved.
func (c *Client) BackupDomain(ctx context.Context, req hsm.BackupRequest) (wrapped []byte, kek string, err error) {
	var out wrappedDomain
	err = c.do(ctx, "backup", http.MethodPost, "/v1/domain/backup", req, &out)
	return out.Wrapped, out.KEK, err
}

// SetEpoch tells the member which site may write. Nothing happens when it knows.
func (c *Client) SetEpoch(ctx context.Context, r hsm.EpochRecord) error {
	return c.do(ctx, "epoch", http.MethodPost, "/v1/epoch", r, &none{})
}

// Activate logs a locked member in. A PIN that was refused once is not tried again; any other costs the token one of its
// attempts. Nothing happens, and the PIN is not looked at, when the member is active.
func (c *Client) Activate(ctx context.Context, pin string) error {
	return c.do(ctx, "activate", http.MethodPost, "/v1/activate", activateRequest{pin}, &none{})
}

// RotatePIN has the member give its token another user PIN, as two people approved. Its agent then ends, to be started again:
// only the login in the new process, told by Health, says which PIN the token has. Nothing happens when it was done before
// under this approval. After an error from underway nobody knows more than after none: look at Health.
func (c *Client) RotatePIN(ctx context.Context, req hsm.PINRequest) error {
	return c.do(ctx, opRotatePIN, http.MethodPost, "/v1/pin/rotate", req, &none{})
}

func (c *Client) do(ctx context.Context, op, method, path string, in, out any) error {
	if _, ok := ctx.Deadline(); !ok {
		return hsm.Errorf(hsm.ClassRequest, op, "calling %s without a deadline", c.name)
	}
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return hsm.Errorf(hsm.ClassRequest, op, "encoding the request: %w", err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, body)
	if err != nil {
		return hsm.Errorf(hsm.ClassRequest, op, "making the request: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return hsm.Errorf(hsm.ClassDevice, op, "calling %s: %w", c.name, err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err == nil && len(answer) > maxAnswer {
		err = errors.New("the answer is too long")
	}
	if err != nil {
		return hsm.Errorf(hsm.ClassDevice, op, "reading the answer of %s: %w", c.name, err)
	}
	if resp.StatusCode != http.StatusOK {
		if err := ctx.Err(); err != nil { // the member may have noticed that first, and answer with it
			return hsm.Errorf(hsm.ClassDevice, op, "calling %s: %w", c.name, err)
		}
		var p problem.Problem
		if json.Unmarshal(answer, &p) != nil || p.Detail == "" {
			p.Detail = strings.TrimSpace("member " + c.name + " answered " + resp.Status)
		}
		return toError(op, resp.StatusCode, p)
	}
	if err := json.Unmarshal(answer, out); err != nil {
		return hsm.Errorf(hsm.ClassDevice, op, "decoding the answer of %s: %w", c.name, err)
	}
	return nil
}
