package main

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"trivet/ca"
	"trivet/hsmsync"
	"trivet/identity"
	"trivet/problem"
)

// blockedKey is a key that is certified no more, as the API shows it.
type blockedKey struct {
	SPKISHA256   string    `json:"spki_sha256"`
	Sequence     uint32    `json:"sequence"`
	Reason       string    `json:"reason"`
	Comment      string    `json:"comment"`
	Actor        string    `json:"actor"`
	Date         time.Time `json:"date"`
	Certificates []struct {
		ID        string     `json:"id"`
		Sequence  uint32     `json:"sequence"`
		Status    string     `json:"status"`
		Profile   string     `json:"profile"`
		Requester string     `json:"requester"`
		NotAfter  *time.Time `json:"not_after,omitempty"`
		Reason    string     `json:"reason,omitempty"`
	} `json:"certificates,omitempty"`
	Next   *string `json:"next,omitempty"`
	Failed []struct {
		ID      string `json:"id"`
		Problem string `json:"problem"`
		Detail  string `json:"detail"`
	} `json:"failed,omitempty"`
}

func (k blockedKey) text(w io.Writer) {
	fmt.Fprintf(w, "key sha256:\t%s\nreason:\t%s\ncomment:\t%s\nby:\t%s\ndate:\t%s\n", k.SPKISHA256, k.Reason, plain(k.Comment), k.Actor, stamp(&k.Date))
	if len(k.Certificates) == 0 {
		fmt.Fprintln(w, "certificates:\tnone")
		return
	}
	fmt.Fprintln(w, "\nCERTIFICATE\tSTATUS\tREASON\tVALID UNTIL\tREQUESTER")
	for _, c := range k.Certificates {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", c.ID, c.Status, c.Reason, stamp(c.NotAfter), c.Requester)
	}
	for _, f := range k.Failed {
		fmt.Fprintf(w, "\nnot revoked everywhere: %s: %s: %s\n", f.ID, f.Problem, f.Detail)
	}
	if k.Next != nil {
		fmt.Fprintf(w, "\nthere are more: --cursor %s\n", *k.Next)
	}
}

func (a *app) blockedKeyCommand() *cobra.Command {
	return a.clientFlags(group("blocked-key", "Subject keys that are certified no more",
		"Subject keys that are certified no more: because others have their private half, or can find it.", a.blockedKeyAdd(), a.blockedKeyList(), a.blockedKeyShow()))
}

// onAdmin calls the first CA node whose administrative listener answers. The request must be one that may be repeated.
func (c *client) onAdmin(ctx context.Context, method, path string, body any) (answer, error) {
	if len(c.Admin) == 0 {
		return answer{}, errors.New("the client configuration names no admin listener of a CA node")
	}
	var errs []error
	for _, address := range c.Admin {
		node := *c
		node.API = address
		ans, err := node.call(ctx, method, path, nil, body)
		var p *problem.Problem
		if err == nil || errors.As(err, &p) && p.Status != http.StatusServiceUnavailable {
			return ans, err
		}
		errs = append(errs, err)
	}
	return answer{}, errors.Join(errs...)
}

func onAdmin[T any](ctx context.Context, c *client, method, path string, body any) (v T, status int, err error) {
	ans, err := c.onAdmin(ctx, method, path, body)
	if err != nil {
		return v, 0, err
	}
	if err := json.Unmarshal(ans.Body, &v); err != nil {
		return v, 0, fmt.Errorf("reading the API's answer: %w", err)
	}
	return v, ans.Status, nil
}

func (a *app) blockedKeyAdd() *cobra.Command {
	var (
		f            grantFlags
		q            ca.BlockRequest
		spki         string
		certificate  string
		csr          string
		asked, given = "", map[string]*string{"spki": &spki, "certificate": &certificate, "csr": &csr}
	)
	c := &cobra.Command{
		Use:   "add",
		Short: "Block a key, for good",
		Long: `Block a key: no certificate is issued for it any more, by any CA, and nothing undoes that. Every certificate that it has already is listed;
--revoke revokes them for keyCompromise. A repeat is safe. Revoking a certificate for keyCompromise blocks its key by itself.

Two CA operators must agree, you and another one:

  1. --request-out FILE   writes down what is to be done, and stops
  2. pkictl approve FILE  adds the other's approval
  3. --grant FILE         does it; you must be the one who made the request

In a demo --approve-as operator2 does all three at once.`,
		Example: `  pkictl blocked-key add --certificate leaked.pem --reason keyCompromise --revoke --request-out block.json
  pkictl approve block.json --cert otto.pem --key otto.key --trust infra.pem
  pkictl blocked-key add --certificate leaked.pem --reason keyCompromise --revoke --grant block.json`,
		Args: cobra.NoArgs,
		RunE: do(a, func(ctx context.Context, _ []string) (blockedKey, error) {
			for name, value := range given {
				if *value != "" {
					asked = name
				}
			}
			if asked == "" {
				return blockedKey{}, usagef("name the key: --spki, --certificate or --csr")
			}
			var err error
			if q.SPKI, err = a.keyToBlock(asked, *given[asked]); err != nil {
				return blockedKey{}, err
			}
			cl, err := a.newClient("operator1")
			if err != nil {
				return blockedKey{}, err
			}
			grant, err := blockGrant(cl, &f, &q)
			if errors.Is(err, errRequested) {
				a.sayf("wrote the request %s: have another CA operator approve it, then say --grant %s", f.requestOut, f.requestOut)
				return blockedKey{SPKISHA256: hex.EncodeToString(q.SPKI), Reason: q.Reason, Comment: q.Comment}, nil
			}
			if err != nil {
				return blockedKey{}, err
			}
			k, status, err := onAdmin[blockedKey](ctx, cl, http.MethodPost, "/v1/blocked-keys", map[string]any{
				"spki_sha256": hex.EncodeToString(q.SPKI), "reason": q.Reason, "comment": q.Comment, "revoke": q.Revoke, "grant": grant,
			})
			if err == nil && status == http.StatusAccepted {
				err = errQuiet
			}
			return k, err
		}, func(w io.Writer, k blockedKey) {
			if k.Sequence > 0 {
				k.text(w)
			}
		}),
	}
	flags := c.Flags()
	flags.StringVar(&spki, "spki", "", "SHA-256 of the key's DER SubjectPublicKeyInfo, in hex")
	flags.StringVar(&certificate, "certificate", "", "file with a certificate for the key, PEM")
	flags.StringVar(&csr, "csr", "", "file with a CSR for the key, PEM")
	flags.StringVar(&q.Reason, "reason", ca.BlockKeyCompromise, "keyCompromise, weakKey or other")
	flags.StringVar(&q.Comment, "comment", "", "kept with the block")
	flags.BoolVar(&q.Revoke, "revoke", false, "revoke the key's certificates for keyCompromise")
	f.add(c)
	c.MarkFlagsMutuallyExclusive("spki", "certificate", "csr")
	_ = c.RegisterFlagCompletionFunc("reason", cobra.FixedCompletions([]string{ca.BlockKeyCompromise, ca.BlockWeakKey, ca.BlockOther}, cobra.ShellCompDirectiveNoFileComp))
	return c
}

// keyToBlock reads which key is meant.
func (a *app) keyToBlock(how, value string) ([]byte, error) {
	if how == "spki" {
		spki, err := hex.DecodeString(value)
		if err != nil || len(spki) != sha256.Size {
			return nil, usagef("--spki %q: want 64 hex digits", value)
		}
		return spki, nil
	}
	text, err := a.readFile(value)
	if err != nil {
		return nil, fmt.Errorf("reading --%s: %w", how, err)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, fmt.Errorf("reading --%s: %s holds no PEM block", how, value)
	}
	var spki []byte
	if how == "certificate" {
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("reading --certificate: %w", err)
		}
		spki = cert.RawSubjectPublicKeyInfo
	} else {
		csr, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("reading --csr: %w", err)
		}
		spki = csr.RawSubjectPublicKeyInfo
	}
	sum := sha256.Sum256(spki)
	return sum[:], nil
}

var errBlockUnapproved = usagef("another CA operator must approve this: --request-out FILE writes the request, `pkictl approve FILE` signs it, --grant FILE does it; in a demo --approve-as operator2 does all three")

// blockGrant returns the other operator's approval. Whether it is enough is for the CA node to say.
func blockGrant(cl *client, f *grantFlags, q *ca.BlockRequest) (identity.Grant, error) {
	var act hsmsync.Act
	act.Action, act.Object, act.Detail = q.Approval()
	return f.grant(cl.demo, act, errBlockUnapproved, func(now time.Time, age time.Duration) (identity.Grant, error) {
		return cl.id.Propose(act.Action, act.Object, act.Detail, now, age) // so that whoever approves it sees that it is proved
	})
}

// blockedPage is one page of the list.
type blockedPage struct {
	BlockedKeys []blockedKey `json:"blocked_keys"`
	Next        *string      `json:"next"`
}

func (a *app) blockedKeyList() *cobra.Command {
	var cursor string
	var limit int
	c := &cobra.Command{
		Use: "list", Short: "List blocked keys", Args: cobra.NoArgs,
		RunE: do(a, func(ctx context.Context, _ []string) (blockedPage, error) {
			cl, err := a.newClient("operator1")
			if err != nil {
				return blockedPage{}, err
			}
			query := url.Values{"limit": {strconv.Itoa(limit)}}
			if cursor != "" {
				query.Set("cursor", cursor)
			}
			page, _, err := onAdmin[blockedPage](ctx, cl, http.MethodGet, "/v1/blocked-keys?"+query.Encode(), nil)
			return page, err
		}, func(w io.Writer, p blockedPage) {
			fmt.Fprintln(w, "KEY SHA256\tREASON\tDATE\tBY\tCOMMENT")
			for _, k := range p.BlockedKeys {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", k.SPKISHA256, k.Reason, stamp(&k.Date), k.Actor, plain(k.Comment))
			}
			if p.Next != nil {
				a.sayf("there may be more: --cursor %s", *p.Next)
			}
		}),
	}
	c.Flags().StringVar(&cursor, "cursor", "", "where the previous page ended")
	c.Flags().IntVar(&limit, "limit", 100, "most keys on one page, up to 1000")
	return c
}

func (a *app) blockedKeyShow() *cobra.Command {
	var cursor string
	c := &cobra.Command{
		Use: "show SPKI", Short: "Show a blocked key and its certificates", Long: "Show a blocked key and its certificates. SPKI is the key's SHA-256 in hex, as `pkictl blocked-key list` and `pkictl cert show` print it.",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usagef("give one key, as `pkictl blocked-key list` shows them; got %d", len(args))
			}
			return nil
		},
		RunE: do(a, func(ctx context.Context, args []string) (blockedKey, error) {
			cl, err := a.newClient("operator1")
			if err != nil {
				return blockedKey{}, err
			}
			path := "/v1/blocked-keys/" + url.PathEscape(args[0])
			if cursor != "" {
				path += "?" + url.Values{"cursor": {cursor}}.Encode()
			}
			k, _, err := onAdmin[blockedKey](ctx, cl, http.MethodGet, path, nil)
			return k, err
		}, func(w io.Writer, k blockedKey) { k.text(w) }),
	}
	c.Flags().StringVar(&cursor, "cursor", "", "where the previous page of certificates ended")
	return c
}
