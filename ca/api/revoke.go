package api

import (
	"context"
	"net/http"
	"time"

	"github.com/gin-gonic/gin"

	"trivet/ca"
)

type revokeBody struct {
	Reason         string     `json:"reason"`
	InvalidityDate *time.Time `json:"invalidity_date"`
	Comment        string     `json:"comment"`
}

type releaseBody struct {
	Comment string `json:"comment"`
}

// revocationJSON is what became of a revocation.
type revocationJSON struct {
	ID         string         `json:"id"`
	Status     string         `json:"status"`
	Reason     string         `json:"reason"`
	Date       time.Time      `json:"date"`
	Sequence   int            `json:"sequence"`
	Responders respondersJSON `json:"responders"`
	CRLBy      time.Time      `json:"crl_by"`
}

type respondersJSON struct {
	Applied int      `json:"applied"`
	Lapsed  []string `json:"lapsed"`
	Pending []string `json:"pending"`
}

// revoke answers 200 when the revocation is effective at every responder, 202 when it is on record and responders are still to learn it.
func (s *server) revoke(c *gin.Context) {
	var body revokeBody
	if p := decode(c.Writer, c.Request, &body); p != nil {
		s.fail(c, p)
		return
	}
	reason, err := ca.ParseReason(body.Reason)
	if err != nil {
		s.fail(c, err)
		return
	}
	var invalidity time.Time
	if body.InvalidityDate != nil {
		if invalidity = body.InvalidityDate.UTC(); invalidity.Year() < 1970 {
			s.fail(c, malformed("invalidity_date", "want a date since 1970"))
			return
		}
	}
	ctx, cancel := context.WithTimeout(c.Request.Context(), s.cfg.RevokeTimeout)
	defer cancel()
	cert, err := s.find(ctx, c)
	if err != nil {
		s.fail(c, err)
		return
	}
	done, err := s.cfg.Revoker.Revoke(ctx, ca.RevokeRequest{
		Issuer: cert.Intent.Issuer, Serial: cert.Intent.Serial, Reason: reason, InvalidityDate: invalidity, Comment: body.Comment, Actor: caller(c),
	})
	s.answerRevocation(c, done, err)
}

// release ends a hold. It needs no body.
func (s *server) release(c *gin.Context) {
	var body releaseBody
	if c.Request.ContentLength != 0 {
		if p := decode(c.Writer, c.Request, &body); p != nil {
			s.fail(c, p)
			return
		}
	}
	ctx, cancel := context.WithTimeout(c.Request.Context(), s.cfg.ReadTimeout)
	defer cancel()
	cert, err := s.find(ctx, c)
	if err != nil {
		s.fail(c, err)
		return
	}
	done, err := s.cfg.Revoker.Release(ctx, ca.ReleaseRequest{Issuer: cert.Intent.Issuer, Serial: cert.Intent.Serial, Comment: body.Comment, Actor: caller(c)})
	s.answerRevocation(c, done, err)
}

func (s *server) answerRevocation(c *gin.Context, done *ca.Revoked, err error) {
	if err != nil {
		s.fail(c, err)
		return
	}
	status := http.StatusOK
	if !done.Reach.Effective() {
		status = http.StatusAccepted
	}
	c.JSON(status, revocationJSON{
		ID: done.ID(), Status: done.Status(), Reason: done.Reason.String(), Date: done.Date.UTC(), Sequence: int(done.N), CRLBy: done.CRLBy.UTC(),
		Responders: respondersJSON{Applied: done.Reach.Applied, Lapsed: orEmpty(done.Reach.Lapsed), Pending: orEmpty(done.Reach.Pending)},
	})
}

func orEmpty(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}
