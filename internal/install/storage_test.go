package install

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestJudgeStorage(t *testing.T) {
	for name, tc := range map[string]struct {
		facts storageFacts
		check string
		want  want
	}{
		"reflinks":          {storageFacts{}, "reflinks", want{LevelOK, "without copying"}},
		"none":              {storageFacts{clone: unix.EOPNOTSUPP}, "reflinks", want{LevelWarn, "--storage image"}},
		"image in use":      {storageFacts{image: true, mounted: true}, "reflinks", want{LevelOK, "without copying"}},
		"image without":     {storageFacts{image: true, mounted: true, clone: unix.EOPNOTSUPP}, "reflinks", want{LevelFail, "unmount"}},
		"image to be":       {storageFacts{image: true, clone: unix.EOPNOTSUPP}, "storage image", want{LevelOK, "can be made"}},
		"image, no tools":   {storageFacts{image: true, mkfs: errors.New("no")}, "storage image", want{LevelFail, "xfsprogs"}},
		"image, no loop":    {storageFacts{image: true, loop: os.ErrNotExist}, "storage image", want{LevelFail, "container"}},
		"image, no XFS":     {storageFacts{image: true, xfs: errors.New("no")}, "storage image", want{LevelFail, "modprobe xfs"}},
		"image, no nothing": {storageFacts{image: true, xfs: errors.New("no"), loop: os.ErrNotExist}, "storage image", want{LevelFail, "modprobe xfs"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := judgeStorage("/data", tc.facts)
			if len(got) != 1 || got[0].Check != tc.check {
				t.Fatalf("got %+v, want one finding of check %q", got, tc.check)
			}
			checkFinding(t, name, got[0], tc.want)
		})
	}
}

// TestGatherStorage looks where sandboxes' files will be, and leaves nothing there.
func TestGatherStorage(t *testing.T) {
	dir := t.TempDir()
	got := gatherStorage(Settings{DataDir: dir, NodeDir: filepath.Join(dir, "node"), Image: true})
	if got.dir != dir || got.mounted {
		t.Errorf("got %+v, want directory %s, nothing mounted", got, dir)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
