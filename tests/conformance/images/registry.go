package main

import (
	"crypto/sha256"
	"fmt"
	"net/http"
	"strconv"
	"strings"
)

// registry is what a client of the distribution protocol may pull: manifests by name and tag or digest, blobs by digest.
type registry struct {
	blobs map[string]blob
	// tags has digests by "NAME:TAG".
	tags map[string]string
}

type blob struct {
	mediaType string
	content   []byte
}

func newRegistry() *registry {
	return &registry{blobs: map[string]blob{}, tags: map[string]string{}}
}

// add keeps a blob and answers its descriptor.
func (r *registry) add(mediaType string, content []byte) descriptor {
	digest := fmt.Sprintf("sha256:%x", sha256.Sum256(content))
	r.blobs[digest] = blob{mediaType, content}
	return descriptor{MediaType: mediaType, Digest: digest, Size: len(content)}
}

// digest is that of a tagged manifest.
func (r *registry) digest(nameAndTag string) string {
	return r.tags[nameAndTag]
}

// ServeHTTP answers GET and HEAD of /v2/, /v2/NAME/manifests/REFERENCE and /v2/NAME/blobs/DIGEST.
func (r *registry) ServeHTTP(answer http.ResponseWriter, request *http.Request) {
	path, found := strings.CutPrefix(request.URL.Path, "/v2/")
	if !found || (request.Method != http.MethodGet && request.Method != http.MethodHead) {
		http.NotFound(answer, request)
		return
	}
	if path == "" {
		return
	}
	digest := ""
	if name, reference, is := cutLast(path, "/manifests/"); is {
		digest = reference
		if !strings.Contains(reference, ":") {
			digest = r.tags[name+":"+reference]
		}
	} else if _, reference, is := cutLast(path, "/blobs/"); is {
		digest = reference
	}
	wanted, known := r.blobs[digest]
	if !known {
		http.NotFound(answer, request)
		return
	}
	answer.Header().Set("Content-Type", wanted.mediaType)
	answer.Header().Set("Docker-Content-Digest", digest)
	answer.Header().Set("Content-Length", strconv.Itoa(len(wanted.content)))
	if request.Method == http.MethodGet {
		_, _ = answer.Write(wanted.content)
	}
}

func cutLast(text, separator string) (before, after string, found bool) {
	at := strings.LastIndex(text, separator)
	if at < 0 {
		return "", "", false
	}
	return text[:at], text[at+len(separator):], true
}
