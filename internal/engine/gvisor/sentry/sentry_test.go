package sentry

import (
	"bytes"
	"compress/gzip"
	"os"
	"path/filepath"
	"testing"
)

func TestUnpackReplacesOthers(t *testing.T) {
	var packed bytes.Buffer
	zw := gzip.NewWriter(&packed)
	if _, err := zw.Write([]byte("#!/bin/true\n")); err != nil {
		t.Fatal(err)
	}
	if err := zw.Close(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, name := range []string{prefix + "old", prefix + "1234.new", "other"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, prefix+"1234")
	if err := unpack(packed.Bytes(), path); err != nil {
		t.Fatal(err)
	}
	if err := removeOthers(dir, filepath.Base(path)); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if len(names) != 2 || names[0] != prefix+"1234" || names[1] != "other" {
		t.Errorf("left: %v", names)
	}
	if err := unpack([]byte("no archive"), path); err == nil {
		t.Error("unpack of what is no archive: no error")
	}
}
