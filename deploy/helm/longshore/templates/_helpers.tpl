{{- define "longshore.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{/* Labels that select: (dict "root" $ "component" "gateway") */}}
{{- define "longshore.selector" -}}
app.kubernetes.io/name: longshore
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "longshore.labels" -}}
{{ include "longshore.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "longshore.podMeta" -}}
labels:
  {{- include "longshore.labels" . | nindent 2 }}
  {{- with .root.Values.podLabels }}{{ toYaml . | nindent 2 }}{{ end }}
{{- with .root.Values.podAnnotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* What every pod has: (dict "root" $ "settings" .Values.broker) */}}
{{- define "longshore.podSpec" -}}
serviceAccountName: {{ .account | default (include "longshore.fullname" .root) }}
automountServiceAccountToken: false
securityContext: {{- toYaml (mergeOverwrite (deepCopy .root.Values.podSecurityContext) (deepCopy (.settings.podSecurityContext | default dict))) | nindent 2 }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .settings.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* (dict "root" $ "service" "gateway") */}}
{{- define "longshore.image" -}}
{{ .root.Values.image.prefix }}-{{ .service }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "longshore.tls" -}}{{ ne .Values.tls.source "none" }}{{- end }}

{{/* Whether rollout sites of other clusters may join: "true" or "" */}}
{{- define "longshore.takesSites" -}}
{{- $told := compact (list .Values.sites.weights .Values.sites.broker .Values.sites.gateway) }}
{{- if and $told (eq .Values.profile "home") }}
{{- if ne (len $told) 3 }}{{ fail "sites.weights, sites.broker and sites.gateway: set all three, or none" }}{{ end }}
{{- if eq .Values.tls.source "none" }}{{ fail "sites: a home that takes rollout sites needs TLS: set tls.source to given or cert-manager" }}{{ end }}
{{- "true" }}
{{- end }}
{{- end }}

{{- define "longshore.tlsSecret" -}}
{{- if eq .Values.tls.source "given" }}{{ required "tls.existingSecret: name the secret with tls.crt, tls.key and ca.crt" .Values.tls.existingSecret }}{{ else }}{{ include "longshore.fullname" . }}-tls{{ end }}
{{- end }}

{{- define "longshore.brokerSecret" -}}
{{ .Values.broker.existingSecret | default (printf "%s-broker" (include "longshore.fullname" .)) }}
{{- end }}

{{- define "longshore.databaseSecret" -}}
{{ .Values.database.existingSecret | default (printf "%s-database" (include "longshore.fullname" .)) }}
{{- end }}

{{- define "longshore.gatewaySecret" -}}
{{ .Values.gateway.existingSecret | default (printf "%s-gateway" (include "longshore.fullname" .)) }}
{{- end }}

{{/* A value that stays what it was at the first install: (dict "root" $ "secret" NAME "key" KEY) */}}
{{- define "longshore.kept" -}}
{{- $found := lookup "v1" "Secret" .root.Release.Namespace .secret }}
{{- if and $found (hasKey ($found.data | default dict) .key) }}{{ index $found.data .key | b64dec }}{{ else }}{{ randAlphaNum 40 }}{{ end }}
{{- end }}

{{/* Environment of every process of ours: (dict "root" $) */}}
{{- define "longshore.env" -}}
- {name: LONGSHORE_LOG_LEVEL, value: {{ .root.Values.logLevel | quote }}}
- {name: LONGSHORE_METRICS_LISTEN, value: "0.0.0.0:9100"}
- {name: LONGSHORE_SECRETS_DIR, value: /run/secrets/longshore}
{{- if eq (include "longshore.tls" .root) "true" }}
- {name: LONGSHORE_TLS_CERT, value: /run/secrets/tls/tls.crt}
- {name: LONGSHORE_TLS_KEY, value: /run/secrets/tls/tls.key}
- {name: LONGSHORE_TLS_CA, value: /run/secrets/tls/ca.crt}
{{- end }}
{{- end }}

{{- define "longshore.extraEnv" -}}
{{- range $name, $value := . }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}

{{- define "longshore.objectStoreEnv" -}}
{{- with .Values.objectStore.existingSecret }}
envFrom:
  - secretRef: {name: {{ . }}}
{{- end }}
{{- end }}

{{/* Kubelet's own gRPC probe knows no TLS and no sockets. */}}
{{- /* Of a container whose metrics are at this named port: no process is started to ask. */ -}}
{{- define "longshore.probes" -}}
startupProbe:
  httpGet: {path: /healthz, port: {{ . }}}
  periodSeconds: 2
  timeoutSeconds: 10
  failureThreshold: 150
readinessProbe:
  httpGet: {path: /healthz, port: {{ . }}}
  periodSeconds: 10
  timeoutSeconds: 10
livenessProbe:
  httpGet: {path: /healthz, port: {{ . }}}
  periodSeconds: 20
  timeoutSeconds: 10
  failureThreshold: 6
{{- end }}

{{- define "longshore.tlsMount" -}}
{{- if eq (include "longshore.tls" .) "true" }}
- {name: tls, mountPath: /run/secrets/tls, readOnly: true}
{{- end }}
{{- end }}

{{- define "longshore.tlsVolume" -}}
{{- if eq (include "longshore.tls" .) "true" }}
- name: tls
  secret: {secretName: {{ include "longshore.tlsSecret" . }}, defaultMode: 0440}
{{- end }}
{{- end }}

{{/* (dict "name" "data" "persistence" .Values.home.persistence) */}}
{{- define "longshore.claim" -}}
- metadata: {name: {{ .name }}}
  spec:
    accessModes: {{ .persistence.accessModes | default (list "ReadWriteOnce") | toJson }}
    {{- with .persistence.storageClass }}
    storageClassName: {{ . }}
    {{- end }}
    resources: {requests: {storage: {{ .persistence.size }}}}
{{- end }}

{{/* Names of the certificate: what the release listens as, and the Services of jobs' pods. */}}
{{- define "longshore.tlsNames" -}}
- localhost
{{- range $service := list "weights" "broker" "relay" "generator" "verifier" "actor" }}
- {{ include "longshore.fullname" $ }}-{{ $service }}
- {{ include "longshore.fullname" $ }}-{{ $service }}.{{ $.Release.Namespace }}.svc
{{- end }}
{{- if eq .Values.launcher.kind "kubernetes" }}
- "*.{{ .Release.Namespace }}.svc"
{{- end }}
{{- range .Values.tls.extraNames }}
- {{ . | quote }}
{{- end }}
{{- end }}

{{/* The launcher's file: what the release knows itself, with launcher.home and launcher.clusters laid over it. */}}
{{- define "longshore.clusters" -}}
{{- $name := include "longshore.fullname" . }}
{{- $claim := .Values.home.persistence.existingClaim | default (printf "data-%s-home-0" $name) }}
{{- $home := dict
  "namespace" .Release.Namespace
  "release" .Release.Name
  "owner" (dict "name" (printf "%s-home" $name))
  "serviceAccount" $name
  "tlsSecret" (include "longshore.tlsSecret" .)
  "priorityClassName" .Values.priorityClassName
  "networkPolicy" .Values.networkPolicy.enabled
  "objectStoreSecret" .Values.objectStore.existingSecret
  "weights" (printf "%s-weights.%s.svc:%v" $name .Release.Namespace .Values.weights.service.port)
  "homeClaim" $claim
  "dataClaim" .Values.home.dataClaim
  "learnerBesideHome" (not (has "ReadWriteMany" .Values.home.persistence.accessModes)) }}
{{- $pulls := list }}
{{- range .Values.imagePullSecrets }}{{ $pulls = append $pulls .name }}{{ end }}
{{- $_ := set $home "imagePullSecrets" $pulls }}
{{- $clusters := dict "home" (mergeOverwrite $home (deepCopy .Values.launcher.home)) }}
{{- range $site, $cluster := .Values.launcher.clusters }}
{{- $_ := set $clusters $site $cluster }}
{{- end }}
{{- $image := dict "prefix" .Values.image.prefix "tag" (.Values.image.tag | default .Chart.AppVersion) "pullPolicy" .Values.image.pullPolicy "broker" .Values.broker.image }}
{{- toYaml (dict "image" $image "logLevel" .Values.logLevel "clusters" $clusters) }}
{{- end }}
