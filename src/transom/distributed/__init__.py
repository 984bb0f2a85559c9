"""Many ranks on torch's own engine: meshes, and what divides a built model from outside."""
