// Light and dark: as the system has it, or as the button says.

const NAME = "lorafleet.theme";
const THEMES = ["system", "light", "dark"];

export function startTheme(button) {
  let theme = localStorage.getItem(NAME);
  if (!THEMES.includes(theme)) theme = "system";
  const show = () => {
    document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
  };
  show();
  button.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    localStorage.setItem(NAME, theme);
    show();
  });
}
