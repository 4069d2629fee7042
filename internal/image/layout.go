package image

import (
	"context"
	"encoding/json"
	"fmt"
	"runtime"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/cloister-dev/cloister/internal/sandbox"
)

// maxIndexes is how deep an index may lead to another.
const maxIndexes = 4

func (b *build) fromLayout(ctx context.Context) error {
	m, err := b.openMembers(ctx)
	if err != nil {
		return err
	}
	c, digest, err := readLayout(m)
	if err != nil {
		return fmt.Errorf("OCI layout: %w", err)
	}
	b.image.Resolved = b.source.String() + "@" + digest
	return b.unpack(ctx, c)
}

// readLayout finds the one image of a layout that fits this machine.
func readLayout(m members) (c *container, digest string, err error) {
	var index v1.IndexManifest
	if err := readDocument(m, "index.json", &index); err != nil {
		return nil, "", err
	}
	for range maxIndexes {
		desc, err := pick(index.Manifests)
		if err != nil {
			return nil, "", err
		}
		if !desc.MediaType.IsIndex() {
			c, err := readManifest(m, desc.Digest)
			return c, desc.Digest.String(), err
		}
		index = v1.IndexManifest{}
		if err := readBlob(m, desc.Digest, &index); err != nil {
			return nil, "", err
		}
	}
	return nil, "", sandbox.Invalidf("its indexes lead to more than %d others", maxIndexes)
}

// pick returns the only image that can run here. Attestations and the like are no images.
func pick(all []v1.Descriptor) (v1.Descriptor, error) {
	var fit []v1.Descriptor
	var seen []string
	for _, d := range all {
		p := d.Platform
		switch {
		case !d.MediaType.IsIndex() && !d.MediaType.IsImage() && d.MediaType != types.MediaType(""):
		case p == nil || p.Architecture == "" || p.OS == "linux" && p.Architecture == runtime.GOARCH:
			fit = append(fit, d)
		default:
			seen = append(seen, p.OS+"/"+p.Architecture)
		}
	}
	switch len(fit) {
	case 0:
		return v1.Descriptor{}, sandbox.Invalidf("it has no image for linux/%s, only for [%.512s]", runtime.GOARCH, strings.Join(seen, " "))
	case 1:
		return fit[0], nil
	default:
		return v1.Descriptor{}, sandbox.Invalidf("it has %d images for linux/%s; keep one", len(fit), runtime.GOARCH)
	}
}

func readManifest(m members, digest v1.Hash) (*container, error) {
	var manifest v1.Manifest
	if err := readBlob(m, digest, &manifest); err != nil {
		return nil, err
	}
	c := &container{config: &v1.ConfigFile{}}
	if err := readBlob(m, manifest.Config.Digest, c.config); err != nil {
		return nil, err
	}
	names := make([]string, 0, len(manifest.Layers))
	for _, l := range manifest.Layers {
		name, err := blobName(l.Digest)
		if err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	return c, c.addLayers(m, names)
}

func blobName(digest v1.Hash) (string, error) {
	if digest.Algorithm != "sha256" || !isHexDigest(digest.Hex) {
		return "", sandbox.Invalidf("digest %.128q is not a SHA-256 digest", digest.String())
	}
	return "blobs/sha256/" + digest.Hex, nil
}

// readBlob decodes a JSON blob after checking that it is the one that its digest names.
func readBlob(m members, digest v1.Hash, to any) error {
	name, err := blobName(digest)
	if err != nil {
		return err
	}
	data, err := readSmall(m, name)
	if err != nil {
		return err
	}
	if got := digestOf(data); got != digest.String() {
		return sandbox.Invalidf("blob %s has digest %s", digest, got)
	}
	if err := json.Unmarshal(data, to); err != nil {
		return sandbox.Invalidf("blob %s is not what it should be: %v", digest, err)
	}
	return nil
}
