"""`make k8s-check`: what `deploy/k8s` builds, held against schemas, a policy, itself and the code."""
