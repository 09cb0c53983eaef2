package hsmtest

import (
	"os"
	"testing"
)

// NSS is where NSS's software token module is; it skips the test where it is not, or fails it when CI=true.
func NSS(t testing.TB) string {
	t.Helper()
	for _, path := range []string{os.Getenv("NSS_SOFTOKEN_MODULE"), "/usr/lib/x86_64-linux-gnu/libsoftokn3.so", "/usr/lib/aarch64-linux-gnu/libsoftokn3.so", "/usr/lib64/libsoftokn3.so"} {
		if _, err := os.Stat(path); path != "" && err == nil {
			return path
		}
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("NSS is missing: install libnss3")
	}
	t.Skip("NSS is missing: install libnss3")
	return ""
}
