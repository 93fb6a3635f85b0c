package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"fmt"
)

const (
	manifestType = "application/vnd.oci.image.manifest.v1+json"
	configType   = "application/vnd.oci.image.config.v1+json"
	layerType    = "application/vnd.oci.image.layer.v1.tar+gzip"
)

// The parts of the OCI image format that are used here.
type (
	descriptor struct {
		MediaType string `json:"mediaType"`
		Digest    string `json:"digest"`
		Size      int    `json:"size"`
	}
	manifest struct {
		SchemaVersion int          `json:"schemaVersion"`
		MediaType     string       `json:"mediaType"`
		Config        descriptor   `json:"config"`
		Layers        []descriptor `json:"layers"`
	}
	config struct {
		Architecture string  `json:"architecture"`
		OS           string  `json:"os"`
		Config       process `json:"config"`
		RootFS       rootFS  `json:"rootfs"`
	}
	process struct {
		User       string            `json:"User,omitempty"`
		Env        []string          `json:"Env,omitempty"`
		Entrypoint []string          `json:"Entrypoint,omitempty"`
		Cmd        []string          `json:"Cmd,omitempty"`
		Labels     map[string]string `json:"Labels,omitempty"`
	}
	rootFS struct {
		Type    string   `json:"type"`
		DiffIDs []string `json:"diff_ids"`
	}
)

// file is an entry of a layer: a directory if its name ends with a slash, a link if it has a target.
type file struct {
	name    string
	mode    int64
	content []byte
	target  string
}

// layer is a packed layer in the registry.
type layer struct {
	descriptor
	diffID string
}

// addLayer packs files into a layer. Every owner is root, every time the same: the digest depends on the files alone.
func (r *registry) addLayer(files []file) (layer, error) {
	var plain bytes.Buffer
	writer := tar.NewWriter(&plain)
	for _, file := range files {
		header := &tar.Header{Name: file.name, Mode: file.mode, Size: int64(len(file.content)), Typeflag: tar.TypeReg}
		switch {
		case file.target != "":
			header.Typeflag, header.Linkname = tar.TypeSymlink, file.target
		case file.name[len(file.name)-1] == '/':
			header.Typeflag = tar.TypeDir
		}
		if err := writer.WriteHeader(header); err != nil {
			return layer{}, fmt.Errorf("packing %s: %w", file.name, err)
		}
		if _, err := writer.Write(file.content); err != nil {
			return layer{}, fmt.Errorf("packing %s: %w", file.name, err)
		}
	}
	if err := writer.Close(); err != nil {
		return layer{}, err
	}
	var packed bytes.Buffer
	zip := gzip.NewWriter(&packed)
	if _, err := zip.Write(plain.Bytes()); err != nil {
		return layer{}, err
	}
	if err := zip.Close(); err != nil {
		return layer{}, err
	}
	diffID := fmt.Sprintf("sha256:%x", sha256.Sum256(plain.Bytes()))
	return layer{r.add(layerType, packed.Bytes()), diffID}, nil
}

// addImage makes an image and tags it "NAME:TAG".
func (r *registry) addImage(nameAndTag string, does process, layers ...layer) error {
	does.Env = append(does.Env, "PATH=/usr/sbin:/bin")
	made := config{Architecture: "amd64", OS: "linux", Config: does, RootFS: rootFS{Type: "layers"}}
	names := manifest{SchemaVersion: 2, MediaType: manifestType}
	for _, layer := range layers {
		made.RootFS.DiffIDs = append(made.RootFS.DiffIDs, layer.diffID)
		names.Layers = append(names.Layers, layer.descriptor)
	}
	text, err := json.Marshal(made)
	if err != nil {
		return err
	}
	names.Config = r.add(configType, text)
	if text, err = json.Marshal(names); err != nil {
		return err
	}
	r.tags[nameAndTag] = r.add(manifestType, text).Digest
	return nil
}
