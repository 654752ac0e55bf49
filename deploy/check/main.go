// Command check reads the manifests of a folder and refuses what a cluster would:
// a document that does not decode strictly into the Kubernetes type it names, a
// reference to something that no manifest defines, an image without a version.
package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	snapshot "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	rbac "k8s.io/api/rbac/v1"
	storage "k8s.io/api/storage/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"sigs.k8s.io/yaml"
)

// kinds are all that drover's manifests may hold.
var kinds = map[string]func() any{
	"v1/Namespace":                                    func() any { return &core.Namespace{} },
	"v1/ServiceAccount":                               func() any { return &core.ServiceAccount{} },
	"v1/Service":                                      func() any { return &core.Service{} },
	"v1/ConfigMap":                                    func() any { return &core.ConfigMap{} },
	"v1/PersistentVolumeClaim":                        func() any { return &core.PersistentVolumeClaim{} },
	"apps/v1/Deployment":                              func() any { return &apps.Deployment{} },
	"apps/v1/DaemonSet":                               func() any { return &apps.DaemonSet{} },
	"rbac.authorization.k8s.io/v1/Role":               func() any { return &rbac.Role{} },
	"rbac.authorization.k8s.io/v1/RoleBinding":        func() any { return &rbac.RoleBinding{} },
	"rbac.authorization.k8s.io/v1/ClusterRole":        func() any { return &rbac.ClusterRole{} },
	"rbac.authorization.k8s.io/v1/ClusterRoleBinding": func() any { return &rbac.ClusterRoleBinding{} },
	"storage.k8s.io/v1/CSIDriver":                     func() any { return &storage.CSIDriver{} },
	"storage.k8s.io/v1/StorageClass":                  func() any { return &storage.StorageClass{} },
	"snapshot.storage.k8s.io/v1/VolumeSnapshotClass":  func() any { return &snapshot.VolumeSnapshotClass{} },
}

// kustomization is the part of a kustomization.yaml that drover uses.
type kustomization struct {
	APIVersion string   `json:"apiVersion"`
	Kind       string   `json:"kind"`
	Namespace  string   `json:"namespace"`
	Resources  []string `json:"resources"`
	Images     []struct {
		Name   string `json:"name"`
		NewTag string `json:"newTag"`
	} `json:"images"`
}

type checker struct {
	problems []string
	objects  map[string]any // "Kind namespace/name"
	files    map[string]string
}

func newChecker() *checker {
	return &checker{objects: map[string]any{}, files: map[string]string{}}
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: check FOLDER")
		os.Exit(2)
	}
	c := newChecker()
	if err := c.folder(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	c.references()
	for _, problem := range c.problems {
		fmt.Fprintln(os.Stderr, problem)
	}
	if len(c.problems) > 0 {
		os.Exit(1)
	}
	fmt.Printf("%d objects\n", len(c.objects))
}

func (c *checker) report(where, format string, values ...any) {
	c.problems = append(c.problems, where+": "+fmt.Sprintf(format, values...))
}

// folder reads a kustomization and every file it lists, and finds files that it
// does not list.
func (c *checker) folder(folder string) error {
	path := filepath.Join(folder, "kustomization.yaml")
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var list kustomization
	if err := yaml.UnmarshalStrict(text, &list); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	listed := map[string]bool{"kustomization.yaml": true}
	for _, name := range list.Resources {
		listed[name] = true
		if err := c.file(filepath.Join(folder, name)); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(folder)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if strings.HasSuffix(entry.Name(), ".yaml") && !listed[entry.Name()] {
			c.report(filepath.Join(folder, entry.Name()), "kustomization.yaml does not list it")
		}
	}
	return nil
}

func (c *checker) file(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	for number, document := range bytes.Split(text, []byte("\n---\n")) {
		c.document(fmt.Sprintf("%s, document %d", path, number+1), document)
	}
	return nil
}

func (c *checker) document(where string, text []byte) {
	var head meta.TypeMeta
	if err := yaml.Unmarshal(text, &head); err != nil {
		c.report(where, "%v", err)
		return
	}
	blank, known := kinds[head.APIVersion+"/"+head.Kind]
	if !known {
		c.report(where, "no manifest of drover's is a %q of %q", head.Kind, head.APIVersion)
		return
	}
	object := blank()
	if err := yaml.UnmarshalStrict(text, object); err != nil {
		c.report(where, "%s: %v", head.Kind, err)
		return
	}
	named := object.(meta.Object)
	for _, problem := range validation.IsDNS1123Subdomain(named.GetName()) {
		c.report(where, "name %q: %s", named.GetName(), problem)
	}
	key := key(head.Kind, named.GetNamespace(), named.GetName())
	if _, twice := c.objects[key]; twice {
		c.report(where, "%s is defined twice", key)
	}
	c.objects[key] = object
	c.files[key] = where
}

func key(kind, namespace, name string) string {
	return kind + " " + namespace + "/" + name
}

// references checks what one object says of another.
func (c *checker) references() {
	for key, object := range c.objects {
		where := c.files[key]
		namespace := object.(meta.Object).GetNamespace()
		if namespace != "" {
			c.need(where, "Namespace", "", namespace)
		}
		switch object := object.(type) {
		case *apps.Deployment:
			c.workload(where, namespace, object.Spec.Selector, object.Spec.Template)
		case *apps.DaemonSet:
			c.workload(where, namespace, object.Spec.Selector, object.Spec.Template)
		case *rbac.RoleBinding:
			c.binding(where, namespace, object.RoleRef, object.Subjects)
		case *rbac.ClusterRoleBinding:
			c.binding(where, "", object.RoleRef, object.Subjects)
		case *storage.StorageClass:
			c.need(where, "CSIDriver", "", object.Provisioner)
		case *snapshot.VolumeSnapshotClass:
			c.need(where, "CSIDriver", "", object.Driver)
		case *core.Service:
			c.service(where, namespace, object)
		}
	}
	c.twins("DaemonSet drover/drover-agent", "DaemonSet drover/drover-agent-attach")
}

// twins checks that the agents with and without a pool differ in nothing but
// the pool and the nodes they run on: every node has one of the two.
func (c *checker) twins(with, without string) {
	whole, there := c.objects[with].(*apps.DaemonSet)
	part, too := c.objects[without].(*apps.DaemonSet)
	if !there || !too {
		c.report("manifests", "no %s or no %s", with, without)
		return
	}
	expected := whole.DeepCopy().Spec.Template.Spec
	isPool := func(name string) bool { return name == "pool" || name == "DROVER_POOL" }
	expected.Volumes = slices.DeleteFunc(expected.Volumes, func(v core.Volume) bool { return isPool(v.Name) })
	for i := range expected.Containers {
		container := &expected.Containers[i]
		container.Env = slices.DeleteFunc(container.Env, func(e core.EnvVar) bool { return isPool(e.Name) })
		container.VolumeMounts = slices.DeleteFunc(container.VolumeMounts, func(m core.VolumeMount) bool { return isPool(m.Name) })
	}
	pool := func(operator core.NodeSelectorOperator) *core.Affinity {
		term := core.NodeSelectorTerm{MatchExpressions: []core.NodeSelectorRequirement{{Key: "drover.io/pool", Operator: operator}}}
		required := &core.NodeSelector{NodeSelectorTerms: []core.NodeSelectorTerm{term}}
		return &core.Affinity{NodeAffinity: &core.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: required}}
	}
	if !reflect.DeepEqual(expected.Affinity, pool(core.NodeSelectorOpExists)) {
		c.report(c.files[with], "runs on other nodes than those labelled drover.io/pool")
	}
	expected.Affinity = pool(core.NodeSelectorOpDoesNotExist)
	if !reflect.DeepEqual(expected, part.Spec.Template.Spec) || !reflect.DeepEqual(whole.Spec.UpdateStrategy, part.Spec.UpdateStrategy) {
		c.report(c.files[without], "differs from %s by more than the pool", with)
	}
}

func (c *checker) need(where, kind, namespace, name string) {
	if _, there := c.objects[key(kind, namespace, name)]; !there {
		c.report(where, "needs %s, which no manifest defines", key(kind, namespace, name))
	}
}

func (c *checker) binding(where, namespace string, role rbac.RoleRef, subjects []rbac.Subject) {
	if role.Kind == "ClusterRole" {
		namespace = ""
	}
	c.need(where, role.Kind, namespace, role.Name)
	for _, subject := range subjects {
		c.need(where, subject.Kind, subject.Namespace, subject.Name)
	}
}

// service finds the pods that a service selects, and its ports on them.
func (c *checker) service(where, namespace string, service *core.Service) {
	for _, object := range c.objects {
		var pod core.PodTemplateSpec
		switch object := object.(type) {
		case *apps.Deployment:
			pod = object.Spec.Template
		case *apps.DaemonSet:
			pod = object.Spec.Template
		default:
			continue
		}
		if object.(meta.Object).GetNamespace() != namespace || !within(service.Spec.Selector, pod.Labels) {
			continue
		}
		for _, port := range service.Spec.Ports {
			if !hasPort(pod.Spec, port.TargetPort.String()) {
				c.report(where, "port %s: the pods have no port %s", port.Name, port.TargetPort.String())
			}
		}
		return
	}
	c.report(where, "selects no pod")
}

func hasPort(pod core.PodSpec, wanted string) bool {
	for _, container := range pod.Containers {
		for _, port := range container.Ports {
			if port.Name == wanted || fmt.Sprint(port.ContainerPort) == wanted {
				return true
			}
		}
	}
	return false
}

func within(part, whole map[string]string) bool {
	for name, value := range part {
		if whole[name] != value {
			return false
		}
	}
	return len(part) > 0
}

// workload checks a pod template: selector, account, volumes, images, probes.
func (c *checker) workload(where, namespace string, selector *meta.LabelSelector, pod core.PodTemplateSpec) {
	if selector == nil || !within(selector.MatchLabels, pod.Labels) {
		c.report(where, "the selector does not match the pods' labels")
	}
	c.need(where, "ServiceAccount", namespace, pod.Spec.ServiceAccountName)
	volumes := map[string]bool{}
	for _, volume := range pod.Spec.Volumes {
		volumes[volume.Name] = false
		if volume.ConfigMap != nil {
			c.need(where, "ConfigMap", namespace, volume.ConfigMap.Name)
		}
		if volume.PersistentVolumeClaim != nil {
			c.need(where, "PersistentVolumeClaim", namespace, volume.PersistentVolumeClaim.ClaimName)
		}
	}
	for _, container := range append(pod.Spec.InitContainers, pod.Spec.Containers...) {
		_, tag, tagged := strings.Cut(container.Image[strings.LastIndex(container.Image, "/")+1:], ":")
		if !tagged || tag == "latest" || tag == "canary" {
			c.report(where, "container %s: image %q has no version", container.Name, container.Image)
		}
		if container.Resources.Requests.Memory().IsZero() || container.Resources.Requests.Cpu().IsZero() {
			c.report(where, "container %s requests no CPU or no memory", container.Name)
		}
		for _, mount := range container.VolumeMounts {
			if _, there := volumes[mount.Name]; !there {
				c.report(where, "container %s mounts %q, which is no volume of the pod", container.Name, mount.Name)
			}
			volumes[mount.Name] = true
		}
		for _, probe := range []*core.Probe{container.LivenessProbe, container.ReadinessProbe, container.StartupProbe} {
			if probe == nil || probe.HTTPGet == nil {
				continue
			}
			wanted := probe.HTTPGet.Port.String()
			if !hasPort(core.PodSpec{Containers: []core.Container{container}}, wanted) {
				c.report(where, "container %s is probed on port %s, which it has not", container.Name, wanted)
			}
		}
	}
	for name, used := range volumes {
		if !used {
			c.report(where, "nobody mounts the volume %s", name)
		}
	}
}
