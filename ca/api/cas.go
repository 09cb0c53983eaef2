package api

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"time"

	"github.com/gin-gonic/gin"

	"trivet/ca"
)

type caJSON struct {
	ID          string           `json:"id"`
	Active      *int             `json:"active"` // generation that issues now
	Generations []generationJSON `json:"generations"`
}

type generationJSON struct {
	ID          string     `json:"id"`
	Generation  int        `json:"generation"`
	State       string     `json:"state"`
	Parent      string     `json:"parent"`
	Subject     string     `json:"subject,omitempty"`
	NotBefore   *time.Time `json:"not_before,omitempty"`
	NotAfter    *time.Time `json:"not_after,omitempty"`
	SHA256      string     `json:"sha256,omitempty"`
	Certificate string     `json:"certificate,omitempty"`
	Chain       []string   `json:"chain,omitempty"`
	URLs        urlsJSON   `json:"urls"`
}

type urlsJSON struct {
	Certificate string `json:"certificate"`
	CRL         string `json:"crl"`
	OCSP        string `json:"ocsp"`
}

func (s *server) cas() []*caJSON {
	snapshot := s.cfg.Issuer.Authorities()
	out := []*caJSON{}
	for _, a := range snapshot.All() { // by CA and generation
		if len(out) == 0 || out[len(out)-1].ID != a.CA {
			one := &caJSON{ID: a.CA}
			if active, err := snapshot.Issuing(a.CA, s.cfg.Now()); err == nil {
				one.Active = &active.Generation
			}
			out = append(out, one)
		}
		last := out[len(out)-1]
		last.Generations = append(last.Generations, s.generation(a))
	}
	return out
}

func (s *server) generation(a *ca.Authority) generationJSON {
	urls := a.URLs(s.cfg.BaseURL)
	g := generationJSON{
		ID: a.Issuer, Generation: a.Generation, State: string(a.State), Parent: a.Parent,
		URLs: urlsJSON{Certificate: urls.Certificate, CRL: urls.CRL, OCSP: urls.OCSP},
	}
	if cert := a.Certificate; cert != nil {
		notBefore, notAfter, sum := cert.NotBefore.UTC(), cert.NotAfter.UTC(), sha256.Sum256(cert.Raw)
		g.Subject, g.NotBefore, g.NotAfter, g.SHA256 = cert.Subject.String(), &notBefore, &notAfter, hex.EncodeToString(sum[:])
		g.Certificate = encodePEM(cert.Raw)
		for _, above := range a.Chain[1:] {
			g.Chain = append(g.Chain, encodePEM(above.Raw))
		}
	}
	return g
}

func (s *server) listCAs(c *gin.Context) {
	c.JSON(http.StatusOK, gin.H{"cas": s.cas()})
}

func (s *server) showCA(c *gin.Context) {
	for _, one := range s.cas() {
		if one.ID == c.Param("ca") {
			c.JSON(http.StatusOK, one)
			return
		}
	}
	s.fail(c, &ca.Error{Name: ca.NotFound, Field: "ca", Detail: "there is no such CA"})
}

type crlJSON struct {
	Issuer     string    `json:"issuer"`
	Number     uint64    `json:"number"`
	ThisUpdate time.Time `json:"this_update"`
	NextUpdate time.Time `json:"next_update"`
	Entries    int       `json:"entries"`
	SHA256     string    `json:"sha256"`
}

// issueCRL signs a CRL now, of the generation named or of the CA's active one.
func (s *server) issueCRL(c *gin.Context) {
	if c.Request.ContentLength != 0 {
		if p := decode(c.Writer, c.Request, &struct{}{}); p != nil {
			s.fail(c, p)
			return
		}
	}
	snapshot := s.cfg.Issuer.Authorities()
	a, ok := snapshot.Issuer(c.Param("ca"))
	if !ok {
		var err error
		if a, err = snapshot.Issuing(c.Param("ca"), s.cfg.Now()); err != nil {
			s.fail(c, &ca.Error{Name: ca.NotFound, Field: "ca", Detail: "there is no such generation, and no CA of that name with an active one"})
			return
		}
	}
	if err := s.record(c, "crl-forced", a.Issuer, ""); err != nil {
		s.fail(c, err)
		return
	}
	ctx, cancel := context.WithTimeout(c.Request.Context(), s.cfg.IssueTimeout)
	defer cancel()
	crl, err := s.cfg.CRLs.Issue(ctx, a.Issuer)
	if err != nil {
		s.fail(c, err)
		return
	}
	sum := sha256.Sum256(crl.DER)
	c.JSON(http.StatusCreated, crlJSON{
		Issuer: crl.Issuer, Number: crl.Number, ThisUpdate: crl.ThisUpdate.UTC(), NextUpdate: crl.NextUpdate.UTC(), Entries: crl.Entries, SHA256: hex.EncodeToString(sum[:]),
	})
}

// profileJSON is a profile with the hash that intents pin.
type profileJSON struct {
	*ca.Profile
	SHA256 string `json:"sha256"`
}

func (s *server) listProfiles(c *gin.Context) {
	all := []profileJSON{}
	for _, p := range s.cfg.Profiles.All() {
		hash := p.Hash()
		all = append(all, profileJSON{Profile: p, SHA256: hex.EncodeToString(hash[:])})
	}
	c.JSON(http.StatusOK, gin.H{"profiles": all})
}
