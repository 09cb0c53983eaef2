package pkcs11

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"slices"
	"strings"

	p11 "github.com/miekg/pkcs11"

	"trivet/hsm"
)

// A note is a few octets of state in the token. It is replaced by writing the new one and then removing the old ones, so
// that a process killed at any moment leaves one that is whole: the newer of two counts, and one whose checksum is wrong
// does not.
const (
	notePrefix  = "trivet-note:"
	noteDomains = notePrefix + "domains"
	noteEpoch   = notePrefix + "epoch"
)

// maxNote bounds a note, in octets: an epoch record with the approvals of a few people and their certificates.
const maxNote = 32 << 10

func isNote(label string) bool { return strings.HasPrefix(label, notePrefix) }

// note is one as read; value is nil if it is not whole.
type note struct {
	object p11.ObjectHandle
	value  []byte
}

func (t *Token) notes(label string) ([]note, error) {
	class, where := uint(p11.CKO_DATA), uint(p11.CKA_VALUE)
	if t.raw.profile.DataAsSecret {
		class, where = p11.CKO_SECRET_KEY, p11.CKA_ID
	}
	objects, err := t.find(attribute{p11.CKA_CLASS, class}, attribute{p11.CKA_LABEL, []byte(label)})
	if err != nil {
		return nil, err
	}
	out := make([]note, len(objects))
	for i, object := range objects {
		v, err := t.read(object, where)
		if err != nil && !is(err, p11.CKR_ATTRIBUTE_TYPE_INVALID) && !is(err, p11.CKR_GENERAL_ERROR) { // of one not whole
			return nil, err
		}
		out[i].object = object
		if err == nil && len(v[0]) > sha256.Size {
			if sum := sha256.Sum256(v[0][sha256.Size:]); bytes.Equal(sum[:], v[0][:sha256.Size]) {
				out[i].value = v[0][sha256.Size:]
			}
		}
	}
	return out, nil
}

// write replaces the notes of that label by one. One that says the same already stays: it may be there because a process
// died before it removed the others.
func (t *Token) write(label string, value []byte) error {
	notes, err := t.notes(label)
	if err != nil {
		return err
	}
	keep := slices.IndexFunc(notes, func(n note) bool { return bytes.Equal(n.value, value) })
	if keep < 0 {
		if err := t.put(label, value); err != nil {
			return err
		}
	}
	for i, n := range notes {
		if i != keep {
			if err := t.remove(n.object); err != nil {
				return err
			}
		}
	}
	return nil
}

// put adds a note.
func (t *Token) put(label string, value []byte) error {
	sum := sha256.Sum256(value)
	value = slices.Concat(sum[:], value)
	name := []attribute{{p11.CKA_LABEL, []byte(label)}, {p11.CKA_TOKEN, true}, {p11.CKA_PRIVATE, true}}
	lines := []attribute{{p11.CKA_CLASS, uint(p11.CKO_DATA)}, {p11.CKA_APPLICATION, []byte("trivet")}, {p11.CKA_VALUE, value}, {p11.CKA_MODIFIABLE, false}}
	if t.raw.profile.DataAsSecret {
		lines = []attribute{{p11.CKA_CLASS, uint(p11.CKO_SECRET_KEY)}, {p11.CKA_KEY_TYPE, uint(p11.CKK_GENERIC_SECRET)}, {p11.CKA_ID, value}, {p11.CKA_VALUE, sum[:]}}
	}
	_, err := t.raw.CreateObject(t.session, template(name, lines))
	return err
}

// newest is the note that comes last by order, the zero value where there is none.
func newest[T any](notes []note, order func(a, b T) int) (best T, found bool) {
	for _, n := range notes {
		var v T
		if n.value == nil || json.Unmarshal(n.value, &v) != nil {
			continue
		}
		if !found || order(v, best) > 0 {
			best, found = v, true
		}
	}
	return best, found
}

func byEpoch(a, b hsm.EpochRecord) int { return cmp.Compare(a.Epoch, b.Epoch) }

func (t *Token) readEpoch() error {
	notes, err := t.notes(noteEpoch)
	if err != nil {
		return classify("epoch", err)
	}
	t.epoch, _ = newest(notes, byEpoch)
	return nil
}

// Epoch is the site epoch kept in the token; the zero record where there is none.
func (t *Token) Epoch() (hsm.EpochRecord, error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.epoch, nil
}

// SetEpoch replaces the site epoch. Of two that a killed process left, the higher counts.
func (t *Token) SetEpoch(r hsm.EpochRecord) error {
	const op = "set-epoch"
	value, err := json.Marshal(r)
	if err != nil {
		return hsm.Errorf(hsm.ClassRequest, op, "%w", err)
	}
	if len(value) > maxNote {
		return hsm.Errorf(hsm.ClassRequest, op, "epoch record of %d octets: at most %d fit", len(value), maxNote)
	}
	t.manage.Lock()
	defer t.manage.Unlock()
	if err := t.write(noteEpoch, value); err != nil {
		return classify(op, err)
	}
	t.mu.Lock()
	t.epoch = r
	t.mu.Unlock()
	return nil
}
