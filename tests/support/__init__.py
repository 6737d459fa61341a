"""What several folders of tests share: helpers and simulated meshes."""
