package api

import (
	"context"
	"encoding/base64"
	"errors"
	"net/http"
	"slices"

	"github.com/gin-gonic/gin"

	"trivet/ca"
	"trivet/db"
	"trivet/identity"
)

type listJSON struct {
	Certificates []*certificateJSON `json:"certificates"`
	Next         *string            `json:"next"`
}

// list answers with one page of what the caller may see, without the certificates' own bytes.
func (s *server) list(c *gin.Context) {
	query, limit, p := pageOf(c, "requester", "issuer", "status")
	if p != nil {
		s.fail(c, p)
		return
	}
	filter := db.Filter{Requester: query["requester"], Issuer: query["issuer"], Status: query["status"], Limit: limit}
	statuses := []string{"", db.StatusValid, db.StatusRevoked, db.StatusHeld, db.StatusExpired, db.StatusPending}
	if !slices.Contains(statuses, filter.Status) {
		s.fail(c, malformed("status", "want valid, revoked, held, expired or pending"))
		return
	}
	if filter.Issuer != "" && !issuerForm.MatchString(filter.Issuer) {
		s.fail(c, malformed("issuer", "want {ca}-g{n}"))
		return
	}
	if text := query["cursor"]; text != "" {
		cursor, err := base64.RawURLEncoding.DecodeString(text)
		if err != nil {
			s.fail(c, malformed("cursor", "it is none that this interface gave"))
			return
		}
		filter.After = string(cursor)
	}
	switch me := caller(c); {
	case me.Role != identity.RoleRequester && me.Role != identity.RoleRA:
	case filter.Requester == "":
		filter.Requester = me.String()
	case filter.Requester != me.String():
		c.JSON(http.StatusOK, listJSON{Certificates: []*certificateJSON{}})
		return
	}
	ctx, cancel := context.WithTimeout(c.Request.Context(), s.cfg.ReadTimeout)
	defer cancel()
	var found db.Page
	err := s.cfg.Rounds.Complete(ctx, func() (err error) {
		found, err = s.cfg.Record.ListCertificates(ctx, filter)
		return err
	})
	switch {
	case ca.NameOf(err) != "":
		s.fail(c, err)
		return
	case errors.Is(err, db.ErrCursor):
		s.fail(c, malformed("cursor", "it is none that this interface gave"))
		return
	case err != nil:
		s.fail(c, databaseProblem(err))
		return
	}
	page := listJSON{Certificates: make([]*certificateJSON, 0, len(found.Certificates))}
	for i := range found.Certificates {
		row := &found.Certificates[i]
		if !maySee(caller(c), row) {
			continue
		}
		v, err := s.view(row)
		if err != nil {
			s.fail(c, err)
			return
		}
		if v.Status != db.StatusAbandoned { // no certificate
			page.Certificates = append(page.Certificates, v)
		}
	}
	if found.Next != "" {
		cursor := base64.RawURLEncoding.EncodeToString([]byte(found.Next))
		page.Next = &cursor
	}
	c.JSON(http.StatusOK, page)
}
