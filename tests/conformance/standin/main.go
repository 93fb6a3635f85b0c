// The programs that critest wants of its images and busybox has not, in one static binary that goes by its name:
//
//	nginx, httpd   a web server on $PORT (80), as a process of the name and title that critest looks for
//	nnp            says its effective user: set-uid root in its image
//	pause          waits for a signal
package main

import (
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
)

// Set once the process has the title of a master process.
const titled = "STANDIN_TITLED"

func main() {
	name := filepath.Base(os.Args[0])
	if os.Getenv(titled) != "" {
		name = os.Getenv(titled)
	}
	var err error
	switch name {
	case "nginx", "httpd":
		err = serve(name)
	case "nnp":
		fmt.Printf("Effective uid: %d\n", os.Geteuid())
	case "pause":
		end := make(chan os.Signal, 1)
		signal.Notify(end, syscall.SIGINT, syscall.SIGTERM)
		<-end
	default:
		err = fmt.Errorf("there is no %q in here", name)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serve(name string) error {
	if os.Getenv(titled) == "" {
		self, err := os.Executable()
		if err != nil {
			return err
		}
		// The title is what is executed, the name in the kernel that of the file.
		return syscall.Exec(self, []string{name + ": master process " + self}, append(os.Environ(), titled+"="+name))
	}
	if err := os.MkdirAll("/var/run", 0o755); err != nil {
		return err
	}
	if err := os.WriteFile("/var/run/"+name+".pid", fmt.Appendf(nil, "%d\n", os.Getpid()), 0o644); err != nil {
		return err
	}
	port := os.Getenv("PORT")
	if port == "" {
		port = "80"
	}
	fmt.Printf("%s: serving port %s\n", name, port)
	http.HandleFunc("/", func(answer http.ResponseWriter, _ *http.Request) { fmt.Fprintf(answer, "Welcome to %s\n", name) })
	return http.ListenAndServe(":"+port, nil)
}
