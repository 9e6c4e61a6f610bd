// Before the first paint: the colours that were chosen, if not the system's.
document.documentElement.dataset.theme = localStorage.getItem("agentao-theme") || "system";
