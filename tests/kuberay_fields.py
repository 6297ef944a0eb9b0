"""The fields of KubeRay's ray.io/v1 by its API reference (1.6.2, and `priority` of 1.7).

What Kubernetes defines, pods above all, is checked by its own schemas; here that is any object.
"""

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
KUBERNETES: Schema = {"type": "object"}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def several(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def closed(*required: str, **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


AUTH = closed(enableK8sTokenAuth=FLAG, secretName=TEXT, mode=one_of("disabled", "token"))
AUTOSCALER = closed(
    resources=KUBERNETES,
    image=TEXT,
    imagePullPolicy=TEXT,
    securityContext=KUBERNETES,
    idleTimeoutSeconds=WHOLE,
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    version=one_of("v1", "v2"),
    env=several(KUBERNETES),
    envFrom=several(KUBERNETES),
    volumeMounts=several(KUBERNETES),
)
HEAD = closed(
    "template",
    template=KUBERNETES,
    headService=KUBERNETES,
    enableIngress=FLAG,
    resources=TEXTS,
    labels=TEXTS,
    rayStartParams=TEXTS,
    serviceType=TEXT,
)
WORKERS = closed(
    "groupName",
    "maxReplicas",
    "minReplicas",
    "template",
    suspend=FLAG,
    groupName=TEXT,
    replicas=WHOLE,
    minReplicas=WHOLE,
    maxReplicas=WHOLE,
    idleTimeoutSeconds=WHOLE,
    priority=WHOLE,
    resources=TEXTS,
    labels=TEXTS,
    rayStartParams=TEXTS,
    template=KUBERNETES,
    scaleStrategy=closed(workersToDelete=several(TEXT)),
    numOfHosts=WHOLE,
)
CLUSTER = closed(
    "headGroupSpec",
    upgradeStrategy=closed(type=one_of("Recreate", "None")),
    authOptions=AUTH,
    suspend=FLAG,
    managedBy=TEXT,
    autoscalerOptions=AUTOSCALER,
    headServiceAnnotations=TEXTS,
    enableInTreeAutoscaling=FLAG,
    gcsFaultToleranceOptions=KUBERNETES,
    headGroupSpec=HEAD,
    rayVersion=TEXT,
    workerGroupSpecs=several(WORKERS),
)
JOB = closed(
    activeDeadlineSeconds=WHOLE,
    backoffLimit=WHOLE,
    rayClusterSpec=CLUSTER,
    submitterPodTemplate=KUBERNETES,
    metadata=TEXTS,
    clusterSelector=TEXTS,
    submitterConfig=closed(backoffLimit=WHOLE),
    managedBy=TEXT,
    deletionStrategy=KUBERNETES,
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    entrypointResources=TEXT,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    ttlSecondsAfterFinished=WHOLE,
    preRunningDeadlineSeconds=WHOLE,
    shutdownAfterJobFinishes=FLAG,
    suspend=FLAG,
)
SERVICE = closed(
    rayClusterDeletionDelaySeconds=WHOLE,
    serviceUnhealthySecondThreshold=WHOLE,
    deploymentUnhealthySecondThreshold=WHOLE,
    serveService=KUBERNETES,
    upgradeStrategy=closed(type=TEXT, clusterUpgradeOptions=KUBERNETES),
    managedBy=TEXT,
    serveConfigV2=TEXT,
    rayClusterConfig=CLUSTER,
    excludeHeadPodFromServeSvc=FLAG,
)


def of_kind(kind: str, spec: Schema) -> Schema:
    return closed(
        *("apiVersion", "kind", "metadata", "spec"),
        apiVersion=one_of("ray.io/v1"),
        kind=one_of(kind),
        metadata=KUBERNETES,
        spec=spec,
    )


KINDS = {
    kind: of_kind(kind, spec)
    for kind, spec in {"RayCluster": CLUSTER, "RayJob": JOB, "RayService": SERVICE}.items()
}
