// A CRI client for the tests: calls any unary method of the runtime and image services with a request in JSON and
// prints the answer in JSON.
//
//	cri SOCKET METHOD [REQUEST]
//
// A failed call ends with status 1, and its gRPC code and message on standard error.
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	_ "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Longer than any sandbox takes to boot where its guest is emulated.
const limit = 3 * time.Minute

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %s\n", status.Code(err), status.Convert(err).Message())
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		return fmt.Errorf("usage: cri SOCKET METHOD [REQUEST]")
	}
	method, err := find(args[1])
	if err != nil {
		return err
	}
	request, err := message(method.Input())
	if err != nil {
		return err
	}
	answer, err := message(method.Output())
	if err != nil {
		return err
	}
	if len(args) > 2 {
		if err := protojson.Unmarshal([]byte(args[2]), request.Interface()); err != nil {
			return fmt.Errorf("the request: %w", err)
		}
	}
	connection, err := grpc.NewClient("unix://"+args[0], grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		return err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	path := fmt.Sprintf("/%s/%s", method.Parent().FullName(), method.Name())
	if err := connection.Invoke(ctx, path, request.Interface(), answer.Interface()); err != nil {
		return err
	}
	text, err := protojson.MarshalOptions{EmitUnpopulated: true}.Marshal(answer.Interface())
	if err != nil {
		return err
	}
	fmt.Println(string(text))
	return nil
}

func find(name string) (protoreflect.MethodDescriptor, error) {
	for _, service := range []protoreflect.FullName{"runtime.v1.RuntimeService", "runtime.v1.ImageService"} {
		found, err := protoregistry.GlobalFiles.FindDescriptorByName(service)
		if err != nil {
			return nil, err
		}
		services, ok := found.(protoreflect.ServiceDescriptor)
		if !ok {
			return nil, fmt.Errorf("%s is no service", service)
		}
		if method := services.Methods().ByName(protoreflect.Name(name)); method != nil {
			return method, nil
		}
	}
	return nil, fmt.Errorf("CRI has no method %s", name)
}

func message(of protoreflect.MessageDescriptor) (protoreflect.Message, error) {
	typ, err := protoregistry.GlobalTypes.FindMessageByName(of.FullName())
	if err != nil {
		return nil, err
	}
	return typ.New(), nil
}
