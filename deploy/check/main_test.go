package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Each mistake, made in a copy of drover's own manifests, must be found.
func TestMistakesAreFound(t *testing.T) {
	cases := []struct{ file, old, new, want string }{
		{"agent.yaml", "hostPID:", "hostPid2:", "unknown field"},
		{"agent.yaml", "periodSeconds: 2", "periodSeconds: soon", "cannot unmarshal"},
		{"agent.yaml", "serviceAccountName: drover-agent", "serviceAccountName: nobody", "needs ServiceAccount drover/nobody"},
		{"agent.yaml", "- name: modules\n              mountPath", "- name: module\n              mountPath", "no volume of the pod"},
		{"agent.yaml", "path: /healthz\n              port: metrics", "path: /healthz\n              port: http", "probed on port http"},
		{"agent.yaml", "periodSeconds: 5", "periodSeconds: 6", "differs from DaemonSet drover/drover-agent"},
		{"agent-attach.yaml", "operator: DoesNotExist", "operator: Exists", "differs from DaemonSet drover/drover-agent"},
		{"agent.yaml", "drover:0.1.0", "drover:latest", "has no version"},
		{"controller.yaml", "targetPort: rpc", "targetPort: grpc", "no port grpc"},
		{"rbac.yaml", "kind: ClusterRole\n  name: drover-controller", "kind: ClusterRole\n  name: admin", "needs ClusterRole /admin"},
		{"storageclass.yaml", "provisioner: drover.io", "provisioner: dover.io", "needs CSIDriver /dover.io"},
		{"csidriver.yaml", "kind: CSIDriver", "kind: CSIDrivers", "no manifest of drover's"},
		{"kustomization.yaml", "  - agent.yaml\n", "", "does not list it"},
	}
	for _, mistake := range cases {
		folder := t.TempDir()
		copyManifests(t, folder)
		path := filepath.Join(folder, mistake.file)
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(text), mistake.old) {
			t.Fatalf("%s does not contain %q any more", mistake.file, mistake.old)
		}
		changed := strings.ReplaceAll(string(text), mistake.old, mistake.new)
		if err := os.WriteFile(path, []byte(changed), 0o600); err != nil {
			t.Fatal(err)
		}
		c := newChecker()
		if err := c.folder(folder); err != nil {
			t.Fatal(err)
		}
		c.references()
		if found := strings.Join(c.problems, "\n"); !strings.Contains(found, mistake.want) {
			t.Errorf("%q for %q in %s: found %q", mistake.new, mistake.old, mistake.file, found)
		}
	}
}

func copyManifests(t *testing.T, folder string) {
	t.Helper()
	paths, err := filepath.Glob("../kubernetes/*.yaml")
	if err != nil || len(paths) == 0 {
		t.Fatal("no manifests", err)
	}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(folder, filepath.Base(path)), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
