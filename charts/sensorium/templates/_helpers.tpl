{{/* What the release's name is completed with. */}}
{{- define "sensorium.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* Name of the release with that of the chart in it, short enough for `-operator` and `-leader-election` behind it. */}}
{{- define "sensorium.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 45 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "sensorium.name" . -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 45 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Name of the operator's objects. */}}
{{- define "sensorium.operator" -}}
{{- include "sensorium.fullname" . }}-operator
{{- end -}}

{{/* Cluster-wide names carry the namespace, so that releases of one name in two namespaces don't meet. */}}
{{- define "sensorium.clusterName" -}}
{{- printf "%s-%s" .Release.Namespace (include "sensorium.operator" .) -}}
{{- end -}}

{{- define "sensorium.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "sensorium.operator" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/*
Labels that select the operator's pods; a Deployment can't change them. The name is the same in every release: the
NetworkPolicies that the operator writes let in pods with that label.
*/}}
{{- define "sensorium.selectorLabels" -}}
app.kubernetes.io/name: sensorium-operator
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "sensorium.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "sensorium.selectorLabels" . }}
app.kubernetes.io/part-of: sensorium
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{/* Labels of the plugin on every node. */}}
{{- define "sensorium.nodeCacheSelectorLabels" -}}
app.kubernetes.io/name: sensorium-node-cache
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: node-cache
{{- end -}}

{{/* include "sensorium.image" (list . $image): the reference of an image, its gaps filled from .Values.image. */}}
{{- define "sensorium.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- $registry := default $root.Values.image.registry $image.registry -}}
{{- $name := ternary (printf "%s/%s" $registry $image.repository) $image.repository (ne $registry "") -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $name $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (coalesce $image.tag $root.Values.image.tag $root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}
