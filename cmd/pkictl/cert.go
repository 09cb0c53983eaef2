package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"trivet/ca"
	"trivet/problem"
)

// certificate is one certificate as the API shows it.
type certificate struct {
	ID             string      `json:"id"`
	CA             string      `json:"ca"`
	Generation     int         `json:"generation"`
	Serial         string      `json:"serial"`
	Status         string      `json:"status"`
	Profile        string      `json:"profile"`
	ProfileVersion int         `json:"profile_version"`
	Subject        string      `json:"subject,omitempty"`
	SANs           []san       `json:"sans,omitempty"`
	NotBefore      *time.Time  `json:"not_before,omitempty"`
	NotAfter       *time.Time  `json:"not_after,omitempty"`
	SHA256         string      `json:"sha256,omitempty"`
	SPKISHA256     string      `json:"spki_sha256,omitempty"`
	Requester      string      `json:"requester"`
	Reference      string      `json:"reference,omitempty"`
	Origin         string      `json:"origin"`
	Certificate    string      `json:"certificate,omitempty"`
	Chain          []string    `json:"chain,omitempty"`
	Revocation     *revocation `json:"revocation"`
}

type san struct {
	Type  string `json:"type"`
	Value string `json:"value"`
}

type revocation struct {
	Reason         string     `json:"reason"`
	Date           time.Time  `json:"date"`
	InvalidityDate *time.Time `json:"invalidity_date"`
	Sequence       int        `json:"sequence"`
}

// revoked is the API's answer to a revocation.
type revoked struct {
	ID         string    `json:"id"`
	Status     string    `json:"status"`
	Reason     string    `json:"reason"`
	Date       time.Time `json:"date"`
	Sequence   int       `json:"sequence"`
	Responders struct {
		Applied int      `json:"applied"`
		Lapsed  []string `json:"lapsed"`
		Pending []string `json:"pending"`
	} `json:"responders"`
	CRLBy time.Time `json:"crl_by"`
}

// issueRequest is the body of a request for a certificate.
type issueRequest struct {
	Profile   string     `json:"profile"`
	CA        string     `json:"ca,omitempty"`
	CSR       string     `json:"csr"`
	NotAfter  *time.Time `json:"not_after,omitempty"`
	Reference string     `json:"reference,omitempty"`
}

// names joins the alternative names for people.
func (c certificate) names() string {
	var names []string
	for _, s := range c.SANs {
		names = append(names, s.Value)
	}
	return strings.Join(names, ", ")
}

func (a *app) certCommand() *cobra.Command {
	return a.clientFlags(group("cert", "Issue, show, list and revoke certificates", `Issue, show, list and revoke certificates.

A certificate's id is {ca}-g{generation}:{serial in lower-case hex}; a serial alone does where it is unique.`,
		a.certIssue(), a.certShow(), a.certList(), a.certRevoke()))
}

func (a *app) certIssue() *cobra.Command {
	var (
		csrFile, keyOut, out, key string
		names                     []string
		req                       issueRequest
		wait                      time.Duration
	)
	c := &cobra.Command{
		Use:   "issue (--csr FILE | --dns NAME --key-out FILE)",
		Short: "Issue a certificate from a CSR, or make key and CSR as well",
		Long: `Issue a certificate from a CSR, or make key and CSR as well.

Certificate and chain are printed as PEM, or written to --out. A request that cannot be served now is repeated for as long as --wait says,
with the same idempotency key: however often it is repeated, and whatever fails meanwhile, one certificate is made. With --dns the request is
kept beside the new key, in FILE.request, until the certificate is there: the same command again goes on with that key and that idempotency key.
Give your own --idempotency-key to have the same certificate again from a later call.`,
		Example: `  pkictl cert issue --csr server.csr --out server.pem
  pkictl cert issue --dns www.example.org --dns example.org --key-out www.key --out www.pem
  openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout k.pem -subj / -addext subjectAltName=DNS:a.example.org |
    pkictl cert issue --csr -`,
		Args: cobra.NoArgs,
		RunE: do(a, func(ctx context.Context, _ []string) (certificate, error) {
			if (csrFile == "") == (len(names) == 0) {
				return certificate{}, usagef("give either --csr or --dns")
			}
			if len(names) > 0 && keyOut == "" {
				return certificate{}, usagef("--dns makes a key: say with --key-out where it goes")
			}
			if out != "" {
				if _, err := os.Stat(filepath.Dir(out)); err != nil {
					return certificate{}, fmt.Errorf("looking where the certificate goes: %w", err)
				}
			}
			cl, err := a.newClient("requester")
			if err != nil {
				return certificate{}, err
			}
			if key, err = a.prepare(csrFile, names, keyOut, &req, key); err != nil {
				return certificate{}, err
			}
			cert, replayed, err := a.issue(ctx, wait, cl, req, key)
			if err != nil {
				switch {
				case len(names) > 0 && refused(err):
					if os.Remove(keyOut) == nil {
						a.sayf("removed the key again: nobody certifies it")
					}
					_ = os.Remove(unfinished(keyOut))
				case len(names) > 0:
					a.sayf("the key %s stays, and what was asked for with it: the same command again goes on where this one ended", keyOut)
				}
				return certificate{}, fmt.Errorf("issuing with idempotency key %s: %w", key, err)
			}
			how := "issued"
			if replayed {
				how = "issued by an earlier request with this idempotency key:"
			}
			a.sayf("%s %s, valid until %s", how, cert.ID, stamp(cert.NotAfter))
			if out != "" {
				if err := writeFile(out, []byte(cert.pem()), 0o644); err != nil {
					return certificate{}, fmt.Errorf("%w; `pkictl cert show --pem %s` prints it", err, cert.ID)
				}
				a.sayf("wrote %s", out)
			}
			if len(names) > 0 {
				if err := os.Remove(unfinished(keyOut)); err != nil && !errors.Is(err, os.ErrNotExist) {
					return certificate{}, fmt.Errorf("the certificate is there, and what asked for it cannot be removed: %w", err)
				}
			}
			return cert, nil
		}, func(w io.Writer, cert certificate) {
			if out != "" {
				fmt.Fprintln(w, cert.ID)
				return
			}
			fmt.Fprint(w, cert.pem())
		}),
	}
	f := c.Flags()
	f.StringVar(&csrFile, "csr", "", "PEM file with the request; - is standard input")
	f.StringArrayVar(&names, "dns", nil, "name to certify, with a new P-256 key; may be repeated")
	f.StringVar(&keyOut, "key-out", "", "where the new key goes; a file that is there is not replaced")
	f.StringVar(&req.Profile, "profile", "tls-server", "profile")
	f.StringVar(&req.CA, "ca", "", "CA, where the profile leaves the choice")
	f.StringVar(&req.Reference, "reference", "", "your own mark, kept with the certificate")
	f.StringVar(&key, "idempotency-key", "", "what makes this request one and the same (default: a random one)")
	f.StringVar(&out, "out", "", "where certificate and chain go, as PEM (default: standard output)")
	f.DurationVar(&wait, "wait", 30*time.Second, "how long to go on asking while nobody can serve; one request may take up to 30 s")
	return c
}

// issue asks for one certificate until it is there, or for as long as wait says.
func (a *app) issue(ctx context.Context, wait time.Duration, cl *client, req issueRequest, key string) (cert certificate, replayed bool, err error) {
	ans, err := a.insist(ctx, wait, cl, http.MethodPost, "/v1/certificates", http.Header{"Idempotency-Key": {key}}, req)
	if err != nil {
		return certificate{}, false, err
	}
	if err := json.Unmarshal(ans.Body, &cert); err != nil {
		return certificate{}, false, fmt.Errorf("reading the API's answer: %w", err)
	}
	return cert, ans.Header.Get("Idempotency-Replayed") == "true", nil
}

// refused tells whether err is a verdict on the request itself, so that there is no certificate and will be none.
func refused(err error) bool {
	var p *problem.Problem
	return errors.As(err, &p) && (slices.Contains([]int{400, 403, 413, 415, 422}, p.Status) || p.Name() == ca.RequestAbandoned)
}

// pem is the certificate and its chain without the root, which whoever trusts it has already.
func (c certificate) pem() string {
	chain := c.Chain
	if n := len(chain); n > 1 {
		chain = chain[:n-1]
	}
	return c.Certificate + strings.Join(chain, "")
}

// newRequest makes a P-256 key and a request for names with it, both PEM.
func newRequest(names []string) (csr, key []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("making a key: %w", err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{}, DNSNames: names}, private)
	if err != nil {
		return nil, nil, fmt.Errorf("making a request: %w", err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, nil, fmt.Errorf("encoding the key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), nil
}

func (a *app) certShow() *cobra.Command {
	var asPEM bool
	c := &cobra.Command{
		Use: "show ID", Short: "Show one certificate and its status", Args: oneID,
		RunE: do(a, func(ctx context.Context, args []string) (certificate, error) {
			cl, err := a.newClient("requester")
			if err != nil {
				return certificate{}, err
			}
			return get[certificate](ctx, cl, "/v1/certificates/"+url.PathEscape(args[0]))
		}, func(w io.Writer, cert certificate) {
			if asPEM {
				fmt.Fprint(w, cert.pem())
				return
			}
			for _, row := range [][2]string{
				{"id", cert.ID}, {"status", cert.Status}, {"subject", cert.Subject}, {"names", cert.names()},
				{"valid from", stamp(cert.NotBefore)}, {"valid until", stamp(cert.NotAfter)},
				{"profile", fmt.Sprintf("%s, version %d", cert.Profile, cert.ProfileVersion)},
				{"requester", cert.Requester}, {"reference", cert.Reference}, {"sha256", cert.SHA256}, {"key sha256", cert.SPKISHA256},
			} {
				if row[1] != "" {
					fmt.Fprintf(w, "%s:\t%s\n", row[0], row[1])
				}
			}
			if r := cert.Revocation; r != nil {
				fmt.Fprintf(w, "revoked:\t%s, %s\n", stamp(&r.Date), r.Reason)
			}
		}),
	}
	c.Flags().BoolVar(&asPEM, "pem", false, "print certificate and chain as PEM")
	return c
}

// page is one page of a search.
type page struct {
	Certificates []certificate `json:"certificates"`
	Next         *string       `json:"next"`
}

func (a *app) certList() *cobra.Command {
	var (
		q     = map[string]*string{}
		limit int
	)
	c := &cobra.Command{
		Use: "list", Short: "Search certificates", Args: cobra.NoArgs,
		Long: "Search certificates. Requesters and RAs see their own; ca-operators, admins and auditors all.",
		RunE: do(a, func(ctx context.Context, _ []string) (page, error) {
			cl, err := a.newClient("requester")
			if err != nil {
				return page{}, err
			}
			query := url.Values{"limit": {strconv.Itoa(limit)}}
			for name, v := range q {
				if *v != "" {
					query.Set(name, *v)
				}
			}
			return get[page](ctx, cl, "/v1/certificates?"+query.Encode())
		}, func(w io.Writer, p page) {
			fmt.Fprintln(w, "ID\tSTATUS\tNAMES\tVALID UNTIL\tREQUESTER")
			for _, cert := range p.Certificates {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", cert.ID, cert.Status, cert.names(), stamp(cert.NotAfter), cert.Requester)
			}
			if p.Next != nil {
				a.sayf("there is more: --cursor %s", *p.Next)
			}
		}),
	}
	f := c.Flags()
	for _, flag := range [][2]string{
		{"requester", "principal URI of the requester"}, {"issuer", "CA generation, such as demo-g1"},
		{"status", "valid, revoked, held, expired or pending"}, {"cursor", "where the previous page ended"},
	} {
		q[flag[0]] = f.String(flag[0], "", flag[1])
	}
	f.IntVar(&limit, "limit", 100, "most certificates on one page, up to 1000")
	return c
}

func (a *app) certRevoke() *cobra.Command {
	var (
		body struct {
			Reason         string     `json:"reason,omitempty"`
			InvalidityDate *time.Time `json:"invalidity_date,omitempty"`
			Comment        string     `json:"comment,omitempty"`
		}
		since string
		wait  time.Duration
	)
	c := &cobra.Command{
		Use:   "revoke ID",
		Short: "Revoke a certificate",
		Long: `Revoke a certificate. The command returns when every responder shows the revocation; if one could not be reached in time it says
which, and the revocation is recorded all the same and reaches them later. Repeating it is safe.`,
		Example: `  pkictl cert revoke demo-g1:353e… --reason superseded`,
		Args:    oneID,
		RunE: do(a, func(ctx context.Context, args []string) (revoked, error) {
			if since != "" {
				t, err := time.Parse(time.RFC3339, since)
				if err != nil {
					return revoked{}, usagef("--invalidity-date %q: want a time such as 2027-01-31T12:00:00Z", since)
				}
				body.InvalidityDate = &t
			}
			cl, err := a.newClient("requester")
			if err != nil {
				return revoked{}, err
			}
			ans, err := a.insist(ctx, wait, cl, http.MethodPost, "/v1/certificates/"+url.PathEscape(args[0])+"/revoke", nil, body)
			if err != nil {
				return revoked{}, err
			}
			var r revoked
			if err := json.Unmarshal(ans.Body, &r); err != nil {
				return revoked{}, fmt.Errorf("reading the API's answer: %w", err)
			}
			if ans.Status == http.StatusAccepted {
				a.sayf("recorded, and not yet effective at %s", strings.Join(r.Responders.Pending, ", "))
			}
			return r, nil
		}, func(w io.Writer, r revoked) {
			fmt.Fprintf(w, "id:\t%s\nstatus:\t%s\nreason:\t%s\ndate:\t%s\n", r.ID, r.Status, r.Reason, stamp(&r.Date))
			fmt.Fprintf(w, "responders:\t%d show it", r.Responders.Applied)
			if n := len(r.Responders.Lapsed); n > 0 {
				fmt.Fprintf(w, ", %d can no longer answer good (%s)", n, strings.Join(r.Responders.Lapsed, ", "))
			}
			fmt.Fprintf(w, "\non the CRL by:\t%s\n", stamp(&r.CRLBy))
		}),
	}
	f := c.Flags()
	f.StringVar(&body.Reason, "reason", "unspecified", "RFC 5280 reason: "+strings.Join(reasons, ", "))
	f.StringVar(&since, "invalidity-date", "", "since when the key may have been misused, as 2027-01-31T12:00:00Z")
	f.StringVar(&body.Comment, "comment", "", "kept with the revocation")
	f.DurationVar(&wait, "wait", 30*time.Second, "how long to go on asking while nobody can serve; one request may take up to 30 s")
	_ = c.RegisterFlagCompletionFunc("reason", cobra.FixedCompletions(reasons, cobra.ShellCompDirectiveNoFileComp))
	return c
}

// reasons are those that --reason takes.
var reasons = []string{"unspecified", "keyCompromise", "affiliationChanged", "superseded", "cessationOfOperation", "certificateHold", "privilegeWithdrawn"}

// oneID wants one certificate id.
func oneID(_ *cobra.Command, args []string) error {
	if len(args) != 1 {
		return usagef("give one certificate id, as `pkictl cert list` shows them; got %d", len(args))
	}
	return nil
}

// stamp is a time for people.
func stamp(t *time.Time) string {
	if t == nil || t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02 15:04:05Z")
}
