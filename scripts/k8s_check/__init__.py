"""`make k8s-check`: check the builds of `deploy/k8s` against schemas, a policy, each other and the code."""
