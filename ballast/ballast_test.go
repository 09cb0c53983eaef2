package ballast

import (
	"runtime"
	"runtime/debug"
	"testing"
)

// TestASmallHeapIsCollectedRarely allocates half a gigabyte that nobody keeps.
func TestASmallHeapIsCollectedRarely(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(100))
	var kept []byte
	collections := func() uint32 {
		runtime.GC()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for range 8192 {
			kept = make([]byte, 64<<10)
		}
		runtime.ReadMemStats(&after)
		runtime.KeepAlive(kept)
		return after.NumGC - before.NumGC
	}
	without := collections()
	Load()
	with := collections()
	t.Logf("%d collections without ballast, %d with it", without, with)
	if with == 0 || with > 512<<20/octets+2 || without < 4*with {
		t.Error("want one for each 64 MB at most, and far more without")
	}
}
