package ocsp_test

import (
	"crypto/sha1"
	"encoding/asn1"
	"os"
	"testing"

	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// Requests that no library makes, octet by octet.

func seq(tag casn1.Tag, parts ...[]byte) []byte {
	b := cryptobyte.NewBuilder(nil)
	b.AddASN1(tag, func(b *cryptobyte.Builder) {
		for _, p := range parts {
			b.AddBytes(p)
		}
	})
	return b.BytesOrPanic()
}

func explicit(n uint8, parts ...[]byte) []byte {
	return seq(casn1.Tag(n).ContextSpecific().Constructed(), parts...)
}

// certIDOf takes the serial as unsigned octets.
func certIDOf(a *authority, serial []byte) []byte {
	for len(serial) > 1 && serial[0] == 0 {
		serial = serial[1:]
	}
	if serial[0] >= 0x80 {
		serial = append([]byte{0}, serial...)
	}
	return certIDRaw(a, serial)
}

// certIDRaw takes the content octets of the INTEGER.
func certIDRaw(a *authority, serial []byte) []byte {
	var spki struct {
		Algorithm asn1.RawValue
		Key       asn1.BitString
	}
	if _, err := asn1.Unmarshal(a.cert.RawSubjectPublicKeyInfo, &spki); err != nil {
		panic(err)
	}
	name, key := sha1.Sum(a.cert.RawSubject), sha1.Sum(spki.Key.Bytes)
	oid, _ := asn1.Marshal(asn1.ObjectIdentifier{1, 3, 14, 3, 2, 26})
	return seq(casn1.SEQUENCE,
		seq(casn1.SEQUENCE, oid, []byte{5, 0}), seq(casn1.OCTET_STRING, name[:]), seq(casn1.OCTET_STRING, key[:]), seq(casn1.INTEGER, serial))
}

func requestList(ids ...[]byte) []byte {
	var list [][]byte
	for _, id := range ids {
		list = append(list, seq(casn1.SEQUENCE, id))
	}
	return seq(casn1.SEQUENCE, list...)
}

func requestOf(ids ...[]byte) []byte {
	return seq(casn1.SEQUENCE, seq(casn1.SEQUENCE, requestList(ids...)))
}

func withNonce(id []byte, n int) []byte {
	oid, _ := asn1.Marshal(asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 48, 1, 2})
	ext := seq(casn1.SEQUENCE, oid, seq(casn1.OCTET_STRING, seq(casn1.OCTET_STRING, make([]byte, n))))
	return seq(casn1.SEQUENCE, seq(casn1.SEQUENCE, requestList(id), explicit(2, seq(casn1.SEQUENCE, ext))))
}

func withCritical(id []byte) []byte {
	oid, _ := asn1.Marshal(asn1.ObjectIdentifier{1, 2, 3, 4})
	ext := seq(casn1.SEQUENCE, oid, []byte{1, 1, 0xff}, seq(casn1.OCTET_STRING, []byte{5, 0}))
	return seq(casn1.SEQUENCE, seq(casn1.SEQUENCE, requestList(id), explicit(2, seq(casn1.SEQUENCE, ext))))
}

func versioned(id []byte, v byte) []byte {
	return seq(casn1.SEQUENCE, seq(casn1.SEQUENCE, explicit(0, seq(casn1.INTEGER, []byte{v})), requestList(id)))
}

func requestorName(id []byte) []byte {
	return seq(casn1.SEQUENCE, seq(casn1.SEQUENCE, explicit(1, seq(casn1.Tag(6).ContextSpecific(), []byte("urn:x"))), requestList(id)))
}

func repeat(id []byte, n int) [][]byte {
	var ids [][]byte
	for range n {
		ids = append(ids, id)
	}
	return ids
}

// missing skips a test for want of a tool, except where everything must be there.
func missing(t *testing.T, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("%s is needed and missing", what)
	}
	t.Skipf("%s is missing", what)
}
