package holder

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"

	"trivet/identity"
	"trivet/problem"
)

// Path is where a CA node takes copies.
const Path = "/internal/held"

// Handler takes batches from other CA nodes, each under the name in its certificate. A batch that is not taken is answered with 409.
func (h *Holder) Handler() http.Handler {
	return identity.Allow(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		peer, ok := identity.Peer(r)
		if !ok || r.Method != http.MethodPost {
			problem.Write(w, problem.New(http.StatusMethodNotAllowed, "method-not-allowed", "copies are posted"))
			return
		}
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxBytes))
		if err != nil {
			problem.Write(w, problem.New(http.StatusRequestEntityTooLarge, "too-large", "the batch is too large or was cut off"))
			return
		}
		b, err := parseBatch(body)
		if err != nil {
			problem.Write(w, problem.New(http.StatusBadRequest, "malformed-request", err.Error()))
			return
		}
		tip, err := h.Put(peer.Name, b)
		if err != nil {
			problem.Write(w, problem.New(http.StatusInternalServerError, "journal-unavailable", err.Error()))
			return
		}
		status := http.StatusOK
		if tip.Reason != "" {
			status = http.StatusConflict
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(tip) // who has gone asks again
	}), identity.RoleCA)
}

// parseBatch reads a batch as it comes from the network.
func parseBatch(body []byte) (Batch, error) {
	var b Batch
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(&b); err != nil {
		return b, fmt.Errorf("reading a batch: %w", err)
	}
	if d.More() {
		return b, fmt.Errorf("reading a batch: something follows it")
	}
	return b, nil
}

// send posts a batch.
func send(ctx context.Context, client *http.Client, address string, b Batch) (Tip, error) {
	body, err := json.Marshal(b)
	if err != nil {
		return Tip{}, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+address+Path, bytes.NewReader(body))
	if err != nil {
		return Tip{}, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		return Tip{}, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
	if err != nil {
		return Tip{}, err
	}
	var tip Tip
	switch resp.StatusCode {
	case http.StatusOK, http.StatusConflict:
		if err := json.Unmarshal(text, &tip); err != nil {
			return Tip{}, fmt.Errorf("reading its answer: %w", err)
		}
		if (tip.Reason == "") != (resp.StatusCode == http.StatusOK) {
			return Tip{}, fmt.Errorf("its answer %d contradicts itself: %.200s", resp.StatusCode, text)
		}
		return tip, nil
	}
	return Tip{}, fmt.Errorf("it answered %s: %.200s", resp.Status, text)
}
